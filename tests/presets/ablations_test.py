import pytest

from configs import ablations as by_file
from selfboottok_jax import errors, trees
from selfboottok_jax.evaluation import published
from selfboottok_jax.presets import ablations, scaling, tokenizer


def test_rows_are_named_once_and_belong_to_tables():
  paths = [row.path for row in ablations.ROWS]
  assert len(set(paths)) == len(paths)
  assert {row.table for row in ablations.ROWS} == set(ablations.TABLES)
  assert by_file.ROWS is ablations.ROWS


@pytest.mark.parametrize('table', ['table2', 'table3', 'figure5', 'figure6'])
def test_every_row_of_the_paper_is_there(table):
  theirs = [row.name for row in published.table(table).rows]
  assert sorted(theirs) == sorted(
    row.name for row in ablations.ROWS if row.table == table
  )


def test_the_variants_have_presets_of_their_own():
  for row in ablations.ROWS:
    name = f'imagenet256_{row.name}'
    if row.table == 'table3' and name in tokenizer.PRESETS:
      config = trees.flatten(tokenizer.get_config(name).to_dict())
      assert config.items() >= row.tokenizer.items()


def test_sizes_of_the_aligner_are_the_papers_labels():
  # Weights of the blocks, 12 w^2 each.
  for name, (width, depth) in scaling.SIZES.items():
    millions = 12 * width**2 * depth / 1e6
    assert millions == pytest.approx(float(name.removesuffix('m')), rel=0.07)


def test_choice_of_rows():
  chosen = ablations.choose(['controls/long', 'table2'])
  assert [row.path for row in chosen] == [
    *('table2/ijepa', 'table2/dinov2', 'table2/siglip2', 'controls/long'),
  ]
  with pytest.raises(errors.ConfigError, match="no row 'table9'; wanted some"):
    ablations.choose(['table3', 'table9'])


def test_stages_of_a_row():
  assert ablations.find('table3/full').stages == (
    *('tokenizer', 'scaling', 'generator'),
  )
  assert ablations.find('figure5/g').stages == ('tokenizer',)
  assert ablations.find('controls/softvq_reg').stages == (
    *('tokenizer', 'generator'),
  )


def test_keys_for_all_rows_are_those_of_the_stages():
  keys = trees.flatten(ablations.get_config().to_dict())
  assert {'train.steps', 'loss.cls', 'trainable', 'encoder_from'} <= set(keys)
  assert {'generator.train.steps', 'scaling.model.local2d_depth'} <= set(keys)
  assert {'evaluate.data.num_images', 'tokenizer.loss.kl'} <= set(keys)
  assert not {'task', 'tokenizer', 'generator.task'} & set(keys)
