import pathlib

import pytest

from selfboottok_jax import errors, presets
from selfboottok_jax.evaluation import published

ROOT = pathlib.Path(__file__).parents[2]


def test_the_papers_own_numbers():
  """As printed in Tables 1, 2 and 3 and in Section 4."""
  for name, row, metric, wanted in (
    ('table1', 'selfboottok', 'gfid', 2.22),
    ('table1', 'mar', 'rfid', 1.22),
    ('table2', 'ijepa', 'psnr', 22.86),
    ('table2', 'siglip2', 'ssim', 0.715),
    ('table3', 'softvq', 'gfid_guided', 1.78),
    ('table3', 'cb_off', 'rfid', 0.73),
    ('figure6', '600m', 'gfid_guided', 1.56),
  ):
    assert published.value(name, row, metric) == wanted
  assert len(published.table('table1').rows) == 21


def test_what_is_not_printed_is_none():
  assert published.value('figure5', 'g_l1', 'rfid') is None
  assert published.value('table3', 'a control of ours', 'rfid') is None
  assert published.value('table3', 'softvq', 'psnr') is None
  assert published.value('a table of ours', 'softvq', 'rfid') is None
  with pytest.raises(errors.UserError, match=r"'table9'.* table1, table2"):
    published.table('table9')


@pytest.mark.parametrize('name', published.TABLES)
def test_every_number_says_where_it_is_from(name):
  table = published.table(name)
  assert len({row.name for row in table.rows}) == len(table.rows)
  assert set(table.metrics) <= set(published.METRICS)
  for row in table.rows:
    for said in (row.paper, row.source):
      assert said.keys() <= {*table.metrics, 'tokens'}
    if name in ('table1', 'context'):
      assert row.origin


@pytest.mark.parametrize(
  ('preset', 'matches'),
  [
    ('imagenet256', ('ijepa', 'full', 'g_l1_l2')),
    ('imagenet256_dinov2', ('dinov2', 'full', 'g_l1_l2')),
    ('imagenet256_siglip2', ('siglip2', 'full', 'g_l1_l2')),
    ('imagenet256_softvq', (None, 'softvq', 'g')),
    ('imagenet256_g_l1', (None, 'g_l1', 'g_l1')),
    ('imagenet256_c_off', (None, 'c_off', None)),
    ('imagenet256_cb_off', (None, 'cb_off', None)),
  ],
)
def test_presets_are_the_rows_they_are_named_after(preset, matches):
  config = presets.get_config(f'tokenizer:{preset}').to_dict()
  for name, match in zip(('table2', 'table3', 'figure5'), matches, strict=True):
    table = published.table(name)
    assert published.is_like(config, table.scale)
    rows = [r.name for r in table.rows if published.is_row(config, r)]
    assert rows == ([match] if match else [])


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('local_input', 'quantized'),
    ('cross_attend', 'all'),
    ('assignment', 'l2'),
    ('bootstrap_from', 'quantized'),
    ('fusion', 'concat'),
  ],
)
def test_another_design_is_no_row_of_the_paper(key, value):
  config = presets.get_config('tokenizer:imagenet256').to_dict()
  config['model'][key] = value
  for name in ('table1', 'table2', 'table3', 'figure5', 'figure6'):
    rows = published.table(name).rows
    assert not [r.name for r in rows if published.is_row(config, r)]


def test_presets_of_other_sizes_are_not_as_large():
  config = presets.get_config('tokenizer:photos64').to_dict()
  assert not published.is_like(config, published.table('table3').scale)
  assert not published.is_like({}, {'model.local2d_depth': 0})


@pytest.mark.parametrize('size', ['10m', '100m', '200m', '400m', '600m'])
def test_sizes_of_figure_6_are_the_presets(size):
  config = presets.get_config(f'scaling:imagenet256_{size}').to_dict()
  rows = published.table('figure6').rows
  assert [r.name for r in rows if published.is_like(config, r.here)] == [size]


def test_the_page_on_deviations_has_the_same_rows():
  told = [
    line
    for line in (ROOT / 'docs' / 'deviations.md').read_text().splitlines()
    if line.startswith('| ') and not line.startswith('| question')
  ]
  assert told == [
    f'| {d.question} | {d.chosen} |{f" `{d.field}`" if d.field else ""} |'
    for d in published.deviations()
  ]
