import pytest

from selfboottok_jax.evaluation import score_tables, scores


def _score(run, metric, value, **protocol):
  return scores.Score(run, metric, value, protocol)


def _texts(group):
  return {
    line.metric: [[(c.value, c.marks) for c in cells] for cells in line.cells]
    for line in group.lines
  }


def test_marks_stand_at_the_heads_that_share_them():
  made = score_tables.arrange(
    [
      _score('a', 'psnr', 20.0, count=10, step=1),
      _score('a', 'ssim', 0.5, description='range 1', step=1),
      _score('b', 'psnr', 21.0, count=10, step=2),
    ]
  )
  (group,) = made.groups
  assert group.runs == [('a', 'a'), ('b', 'b')]
  assert [line.mark for line in group.lines] == ['1', '2']
  assert _texts(group) == {
    'psnr': [[('20.00', '')], [('21.00', '')]],
    'ssim': [[('0.5000', '')], []],
  }
  assert made.footnotes == [
    ('1', 'count 10'),
    ('2', 'range 1'),
    ('a', 'step 1'),
    ('b', 'step 2'),
  ]


def test_what_heads_do_not_share_stands_with_the_numbers():
  """One run with two counts, and one measured at two steps."""
  made = score_tables.arrange(
    [
      _score('a', 'psnr', 20.0, count=10, step=1),
      _score('a', 'psnr', 19.0, count=99, step=1),
      _score('b', 'psnr', 21.0, count=10, step=2),
      _score('b', 'psnr', 22.0, count=10, step=3),
    ]
  )
  (group,) = made.groups
  assert group.runs == [('a', 'a'), ('b', '')]
  assert group.lines[0].mark == ''
  assert _texts(group)['psnr'] == [
    [('20.00', '1'), ('19.00', '2')],
    [('21.00', '1b'), ('22.00', '1c')],
  ]
  assert [mark for mark, _ in made.footnotes] == ['1', '2', 'a', 'b', 'c']


@pytest.mark.parametrize(
  ('metric', 'title'),
  [
    ('psnr', 'Reconstructions'),
    ('lpips_vgg', 'Reconstructions'),
    ('rfid', 'Reconstructions'),
    ('distance_hog', 'Reconstructions'),
    ('fid', 'Sets of pictures'),
    ('fd_hog', 'Sets of pictures'),
    ('precision', 'Sets of pictures'),
    ('psnr_mean_image', 'Reconstructions'),
    ('fd_hog_gaussian_codes', 'Sets of pictures'),
    ('codes_used_global', 'Codebooks'),
    ('perplexity_local1d', 'Codebooks'),
    ('usage', 'Codebooks'),
    ('transport_token_spread', 'Codebooks'),
  ],
)
def test_metrics_are_grouped(metric, title):
  (group,) = score_tables.arrange([_score('a', metric, 1.0, step=1)]).groups
  assert group.title == title
  assert group.is_folded == (title == 'Codebooks')


def test_warnings_and_directions_are_told():
  made = score_tables.arrange(
    [_score('a', 'fid', 1.0, count=3, warning='3 of 2,048 needed')]
  )
  (line,) = made.groups[0].lines
  assert line.arrow == '↓'
  assert line.cells[0][0].warning == '3 of 2,048 needed'
  assert '3 of 2,048 needed' in made.footnotes[0][1]


def test_equal_states_are_one_in_any_order():
  made = score_tables.arrange(
    [
      _score('a', 'psnr', 1.0, step=1, backend='cpu'),
      _score('a', 'fd_hog', 1.0, backend='cpu', step=1),
    ]
  )
  assert made.footnotes == [('a', 'step 1; backend cpu')]


def test_many_states_have_letters():
  found = [_score(f'r{i}', 'psnr', 1.0, step=i) for i in range(28)]
  marks = [mark for _, mark in score_tables.arrange(found).groups[0].runs]
  assert marks[:2] == ['a', 'b']
  assert marks[25:] == ['z', 'aa', 'ab']
