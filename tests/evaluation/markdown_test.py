from selfboottok_jax.evaluation import markdown


def test_a_table():
  assert markdown.table(['a', 'b'], [['1', 'x|y'], ['<b>', 'one\ntwo']]) == (
    '| a | b |\n| --- | --- |\n| 1 | x\\|y |\n| &lt;b> | one<br>two |'
  )
