import json

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import history


def _write(folder, *lines, end='\n'):
  path = folder / 'metrics.jsonl'
  texts = [x if isinstance(x, str) else json.dumps(x) for x in lines]
  path.write_text('\n'.join(texts) + end)
  return path


def test_series_are_sparse_sorted_and_resumed_lines_win(tmp_path):
  path = _write(
    tmp_path,
    {'step': 10, 'loss': 3},
    {'step': 20, 'loss': 2.0},
    {'step': 20, 'val/psnr': 15.5},
    {'step': 30, 'loss': 9.0},
    '',
    {'step': 30, 'loss': 1.0},
    {'step': 25, 'loss': None},
  )
  metrics = history.read_metrics(path)
  assert sorted(metrics) == ['loss', 'val/psnr']
  np.testing.assert_array_equal(metrics['loss'].steps, [10, 20, 25, 30])
  np.testing.assert_array_equal(metrics['loss'].values, [3, 2, np.nan, 1])
  np.testing.assert_array_equal(metrics['val/psnr'].values, [15.5])
  # A workdir stands for its file.
  assert sorted(history.read_metrics(tmp_path)) == sorted(metrics)


@pytest.mark.parametrize('cut', range(1, 27))
def test_a_torn_last_line_is_left_out(tmp_path, cut):
  whole = json.dumps({'step': 20, 'loss': 2.0, 'a': 1.0})
  path = _write(tmp_path, {'step': 10, 'loss': 3.0}, whole[:cut], end='')
  metrics = history.read_metrics(path)
  assert list(metrics) == ['loss']
  np.testing.assert_array_equal(metrics['loss'].steps, [10])


def test_torn_bytes_are_not_text_but_a_torn_line(tmp_path):
  path = _write(tmp_path, {'step': 10, 'loss': 3.0})
  path.write_bytes(path.read_bytes() + b'{"step": 20, "\xc3')
  np.testing.assert_array_equal(history.read_metrics(path)['loss'].steps, [10])


def test_a_torn_middle_line_is_an_error_with_its_number(tmp_path):
  path = _write(tmp_path, {'step': 1}, '{"step": 2, "lo', {'step': 3})
  with pytest.raises(errors.UserError, match=r'Line 2 of .*metrics.jsonl'):
    history.read_metrics(path)


@pytest.mark.parametrize(
  'line',
  ['[1]', '7', {'loss': 1.0}, {'step': 1.5}, {'step': True},
   {'step': 1, 'loss': 'high'}, {'step': 1, 'loss': True}],
)  # fmt: skip
def test_a_line_of_something_else_is_an_error(tmp_path, line):
  path = _write(tmp_path, {'step': 0, 'loss': 1.0}, line, {'step': 3})
  with pytest.raises(errors.UserError, match='Line 2 .* is not a line of'):
    history.read_metrics(path)


def test_no_file_is_an_error_and_an_empty_file_is_not(tmp_path):
  with pytest.raises(errors.UserError, match='cannot be read'):
    history.read_metrics(tmp_path)
  assert history.read_metrics(_write(tmp_path)) == {}


def test_baselines_belong_to_their_metric_alone(tmp_path):
  metrics = history.read_metrics(
    _write(
      tmp_path,
      {'step': 1, 'val/psnr': 9.0, 'val/psnr_mean_image': 5.0},
      {'step': 2, 'val/psnr_mean_image': 6.0, 'val/psnr_mean_colour': 7.0},
      {'step': 2, 'val/psnr_best': 7.0, 'val/ssim_mean_image': 0.5},
    )
  )
  assert history.baselines('val/psnr', metrics) == {
    'mean image': 6.0,
    'mean colour': 7.0,
  }
