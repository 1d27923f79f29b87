import json
import math

import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import ablation

ROWS = {'softvq': 'SoftVQ', 'full': 'Full'}
TABLE = ablation.Table('table3', 'Parts', ROWS, ['Four trainings, three runs.'])


def _value(row, seed, metric, value, of='reconstructions', **protocol):
  protocol = protocol or {'count': 10, 'seed': seed}
  return ablation.Value(
    'table3', row, ROWS[row], seed, metric, of, value, protocol
  )


VALUES = [
  _value('full', 0, 'psnr', 20.0),
  _value('full', 1, 'psnr', 21.0),
  _value('full', 0, 'rfid', 3.0),
  _value('full', 0, 'usage_global', 0.5),
  _value('full', 0, 'fd_hog_gaussian_codes', 0.5, 'samples'),
  _value('full', 0, 'fd_hog', 9.0, 'samples'),
  _value('full', 0, 'parameters', 1234567, 'cost', description='counted'),
]


def _grid(filled, index=0):
  grid = filled.grids[index]
  return {
    label: dict(zip(grid.head, [(c.text, c.paper) for c in cells], strict=True))
    for label, cells in grid.body
  }


def test_mean_and_spread_by_hand():
  assert ablation.mean_and_spread([5.0]) == (5.0, None)
  mean, spread = ablation.mean_and_spread([1.0, 2.0, 6.0])
  # ((-2)^2 + (-1)^2 + 3^2) / 2 = 7.
  assert (mean, spread) == (3.0, pytest.approx(math.sqrt(7)))


def test_a_table_has_the_papers_numbers_and_says_what_was_not_run():
  filled = ablation.fill(TABLE, VALUES, {'softvq': 'no disk'})
  cells = _grid(filled)
  # Half the difference times the square root of 2.
  assert cells['Full']['psnr ↑'] == ('20.50 ± 0.71', '')
  assert cells['Full']['rfid ↓'] == ('3.00 (1 of 2 seeds)', '0.66')
  assert cells['Full']['fid ↓'] == ('not run', '1.56')
  assert cells['Full']['fd_hog ↓'] == ('9.00 (1 of 2 seeds)', '')
  assert cells['Full']['seeds'] == ('0, 1', '')
  assert cells['SoftVQ']['rfid ↓'] == ('not run', '0.88')
  assert cells['SoftVQ']['seeds'] == ('not run', '')
  assert not any('usage' in head for head in filled.grids[0].head)
  assert not any('gaussian' in head for head in filled.grids[0].head)
  assert filled.grids[0].groups == [
    *(('', 1), ('samples', 2), ('reconstructions', 2)),
  ]
  assert filled.grids[0].names[1:4] == [
    *('fid ↓ of samples', 'fd_hog ↓ of samples', 'rfid ↓ of reconstructions'),
  ]
  parameters = ablation.COSTS['parameters']
  assert _grid(filled, 1)['Full'][parameters] == ('1,234,567', '')
  assert filled.failed == [('SoftVQ', 'no disk')]
  # Seeds aside, all have one protocol.
  assert filled.notes == [
    'psnr of reconstructions, rfid of reconstructions, fd_hog of samples: '
    'count 10.',
    'Four trainings, three runs.',
  ]


def test_the_inflated_ssim_stands_where_the_paper_has_one():
  value = _value('full', 0, 'ssim_range2', 0.7)
  assert 'ssim_range2 ↑' not in ablation.fill(TABLE, [value], {}).grids[0].head
  other = ablation.Table('table2', 'Teachers', {'ijepa': 'I-JEPA'})
  cells = _grid(ablation.fill(other, [], {}))
  assert cells['I-JEPA']['ssim_range2 ↑'] == ('not run', '0.7288')


@pytest.mark.parametrize(
  ('values', 'text'),
  [
    ([1234.0, 1236.0], '1,235.0 ± 1.4'),
    ([0.5, 0.5001], '0.500050 ± 0.000071'),
    ([2.0, 2.0], '2.0000 ± 0.0000'),
    ([0.1, 300.1], '150 ± 212'),
  ],
)
def test_digits_follow_the_spread(values, text):
  made = [_value('full', i, 'psnr', value) for i, value in enumerate(values)]
  assert _grid(ablation.fill(TABLE, made, {}))['Full']['psnr ↑'] == (text, '')


def test_costs_that_no_seed_changes_have_no_spread():
  made = [_value('full', i, 'train_pflops', 5.6e-4, 'cost') for i in range(2)]
  head = ablation.COSTS['train_pflops']
  assert _grid(ablation.fill(TABLE, made, {}), 1)['Full'][head][0] == '5.60e-04'


def test_files_are_written_and_read_back(tmp_path):
  ablation.write(
    tmp_path,
    'Ablations <here>',
    ['Base photos64.'],
    [TABLE],
    VALUES,
    {'table3': {'softvq': 'a | b'}},
  )
  assert ablation.read(tmp_path) == VALUES
  records = json.loads((tmp_path / 'ablation.json').read_text())
  assert set(records[0]) == {
    *('table', 'row', 'title', 'seed', 'metric', 'of', 'value', 'protocol'),
  }
  text = (tmp_path / 'ablation.md').read_text()
  assert '| Full | 0, 1 | not run (paper: 1.56) | 9.00 (1 of 2 seeds) |' in text
  assert r'**SoftVQ** failed: a \| b' in text
  page = (tmp_path / 'ablation.html').read_text()
  assert 'Ablations &lt;here&gt;' in page
  assert 'paper 0.66' in page
  assert '20.50 ± 0.71' in page


def test_a_damaged_file_is_named(tmp_path):
  assert ablation.read(tmp_path) == []
  (tmp_path / 'ablation.json').write_text('[{"row": 1}]')
  with pytest.raises(errors.UserError, match='ablation.json is damaged'):
    ablation.read(tmp_path)
