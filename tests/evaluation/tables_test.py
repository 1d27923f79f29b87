import pytest

from selfboottok_jax.evaluation import tables


@pytest.mark.parametrize(
  ('value', 'text'),
  [
    (1234567, '1,234,567'),
    (12345.6, '12,346'),
    (215.84, '215.8'),
    (21.404, '21.40'),
    (-0.71333, '-0.7133'),
    (0.0, '0.0000'),
    (0.000123, '1.23e-04'),
    (float('nan'), 'nan'),
    (float('inf'), 'inf'),
    (True, 'True'),
    ('text', 'text'),
  ],
)
def test_number(value, text):
  assert tables.number(value) == text


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0.25, '0.2 s'),
    (9.96, '10 s'),
    (59.7, '1 min 00 s'),
    (185, '3 min 05 s'),
    (3599.6, '1 h 00 min'),
    (7619.0, '2 h 07 min'),
    (float('nan'), 'unknown'),
  ],
)
def test_duration(seconds, text):
  assert tables.duration(seconds) == text


def test_table_aligns_words_left_and_numbers_right():
  rows = [
    {'run': 'a', 'psnr': 21.4, 'steps': 1600},
    {'run': 'longer', 'psnr': 9.06},
  ]
  assert tables.table(rows, ['run', 'psnr', 'steps']).splitlines() == [
    'run      psnr  steps',
    '------  -----  -----',
    'a       21.40  1,600',
    'longer   9.06',
  ]


def test_table_without_rows_is_its_heading():
  assert tables.table([], ['run', 'psnr']) == 'run  psnr\n---  ----'
