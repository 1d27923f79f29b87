import json
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import curves


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
  metrics = curves.read_metrics(path)
  assert sorted(metrics) == ['loss', 'val/psnr']
  np.testing.assert_array_equal(metrics['loss'].steps, [10, 20, 25, 30])
  np.testing.assert_array_equal(metrics['loss'].values, [3, 2, np.nan, 1])
  np.testing.assert_array_equal(metrics['val/psnr'].values, [15.5])
  # A workdir stands for its file.
  assert sorted(curves.read_metrics(tmp_path)) == sorted(metrics)


@pytest.mark.parametrize('cut', range(1, 27))
def test_a_torn_last_line_is_left_out(tmp_path, cut):
  whole = json.dumps({'step': 20, 'loss': 2.0, 'a': 1.0})
  path = _write(tmp_path, {'step': 10, 'loss': 3.0}, whole[:cut], end='')
  metrics = curves.read_metrics(path)
  assert list(metrics) == ['loss']
  np.testing.assert_array_equal(metrics['loss'].steps, [10])


def test_torn_bytes_are_not_text_but_a_torn_line(tmp_path):
  path = _write(tmp_path, {'step': 10, 'loss': 3.0})
  path.write_bytes(path.read_bytes() + b'{"step": 20, "\xc3')
  np.testing.assert_array_equal(curves.read_metrics(path)['loss'].steps, [10])


def test_a_torn_middle_line_is_an_error_with_its_number(tmp_path):
  path = _write(tmp_path, {'step': 1}, '{"step": 2, "lo', {'step': 3})
  with pytest.raises(errors.UserError, match=r'Line 2 of .*metrics.jsonl'):
    curves.read_metrics(path)


@pytest.mark.parametrize(
  'line',
  ['[1]', '7', {'loss': 1.0}, {'step': 1.5}, {'step': True},
   {'step': 1, 'loss': 'high'}, {'step': 1, 'loss': True}],
)  # fmt: skip
def test_a_line_of_something_else_is_an_error(tmp_path, line):
  path = _write(tmp_path, {'step': 0, 'loss': 1.0}, line, {'step': 3})
  with pytest.raises(errors.UserError, match='Line 2 .* is not a line of'):
    curves.read_metrics(path)


def test_no_file_is_an_error_and_an_empty_file_is_not(tmp_path):
  with pytest.raises(errors.UserError, match='cannot be read'):
    curves.read_metrics(tmp_path)
  assert curves.read_metrics(_write(tmp_path)) == {}


def test_a_log_in_an_object_store(tmp_path, store, bucket):
  path = _write(tmp_path, {'step': 1, 'loss': 1.0})
  store.put(f'{bucket}/run/metrics.jsonl', path.read_bytes())
  for place in (f'{bucket}/run', f'{bucket}/run/metrics.jsonl'):
    assert list(curves.read_metrics(place)['loss'].steps) == [1]
  with pytest.raises(errors.UserError, match=r'cannot be read \(absent\)'):
    curves.read_metrics(f'{bucket}/other')


def test_baselines_belong_to_their_metric_alone(tmp_path):
  metrics = curves.read_metrics(
    _write(
      tmp_path,
      {'step': 1, 'val/psnr': 9.0, 'val/psnr_mean_image': 5.0},
      {'step': 2, 'val/psnr_mean_image': 6.0, 'val/psnr_mean_colour': 7.0},
      {'step': 2, 'val/psnr_best': 7.0, 'val/ssim_mean_image': 0.5},
    )
  )
  assert curves.baselines('val/psnr', metrics) == {
    'mean image': 6.0,
    'mean colour': 7.0,
  }


def _series(values, every=10):
  return curves.Series(
    np.arange(1, len(values) + 1) * every, np.array(values, np.float64)
  )


def _metrics(last=20.0):
  return {
    'data_wait': _series([0.1, 0.2]),
    'pixel': _series([0.5, 0.4]),
    'val/psnr': _series([12.0, 16.0, last], 100),
    'val/psnr_mean_image': _series([11.5], 100),
    'val/psnr_mean_colour': _series([11.0], 100),
    'val/fd': _series([9.0]),
    'loss': _series([3.0, 2.0]),
  }


def _dashed(axis):
  return [line for line in axis.get_lines() if line.get_linestyle() != '-']


def test_panels_are_in_order_and_baselines_have_none():
  assert curves.panels(_metrics()) == [
    'loss', 'val/psnr', 'val/fd', 'pixel', 'data_wait',
  ]  # fmt: skip
  # Without its metric such a name is a number like others.
  alone = {'latent_mean_abs': _series([1.0])}
  assert curves.panels(alone) == ['latent_mean_abs']
  gates = dict.fromkeys(
    ('fusion/gate_local2d', 'fusion/gate_local2d_0', 'fusion/gate_local2d_11'),
    _series([0.1]),
  )
  assert curves.panels(gates) == ['fusion/gate_local2d']


def test_baselines_are_horizontal_broken_lines():
  axis = curves.draw('val/psnr', {'run': _metrics()}).axes[0]
  (line,) = [x for x in axis.get_lines() if x.get_linestyle() == '-']
  np.testing.assert_array_equal(line.get_xdata(), [100, 200, 300])
  np.testing.assert_array_equal(line.get_ydata(), [12, 16, 20])
  levels = [set(x.get_ydata()) for x in _dashed(axis)]
  assert sorted(levels, key=min) == [{11.0}, {11.5}]
  texts = [text.get_text() for text in axis.get_legend().get_texts()]
  assert texts == ['mean colour 11.00', 'mean image 11.50']


def test_several_runs_share_baselines_and_get_a_legend():
  runs = {'_a $x_1$': _metrics(), 'b': _metrics(22.0), 'none': {}}
  figure = curves.draw('val/psnr', runs)
  axis = figure.axes[0]
  solid = [x for x in axis.get_lines() if x.get_linestyle() == '-']
  assert [x.get_ydata()[-1] for x in solid] == [20.0, 22.0]
  assert solid[0].get_color() != solid[1].get_color()
  assert len(_dashed(axis)) == 2
  texts = [text.get_text() for text in axis.get_legend().get_texts()]
  assert texts[:2] == ['_a $x_1$', 'b']
  handles = axis.get_legend().legend_handles
  assert [h.get_color() for h in handles[:2]] == [x.get_color() for x in solid]
  assert curves.svg_bytes(figure)


def test_lonely_and_infinite_values_are_drawn_as_far_as_they_go():
  nan = float('nan')
  for values in ([1.0], [nan], [1.0, float('inf'), 2.0], [nan, 3.0]):
    figure = curves.draw('loss', {'run': {'loss': _series(values)}})
    drawn = figure.axes[0].get_lines()[0].get_ydata()
    finite = np.isfinite(values)
    np.testing.assert_array_equal(drawn[finite], np.array(values)[finite])
    assert np.isnan(drawn[~finite]).all()
    assert curves.svg_bytes(figure)


def test_wide_training_terms_get_a_log_axis():
  wide = _series([100.0, 1.0])
  runs = {'run': {'loss': wide, 'val/fd': wide, 'signed': _series([-1, 99.0])}}
  scales = {
    name: curves.draw(name, runs).axes[0].get_yscale() for name in runs['run']
  }
  assert scales == {'loss': 'log', 'val/fd': 'linear', 'signed': 'linear'}


def test_a_name_nobody_logged_is_an_error():
  with pytest.raises(errors.UserError, match='No metric "lost" .*val/psnr'):
    curves.draw('lost', {'run': _metrics()})


def test_thinning_keeps_means_and_range():
  values = np.random.default_rng(0).normal(size=4000)
  short = curves.thin(_series(values))
  assert len(short.steps) == len(short.values) == curves.MOST_POINTS
  np.testing.assert_allclose(short.values.mean(), values.mean(), atol=1e-12)
  np.testing.assert_allclose(short.values[0], values[:10].mean(), atol=1e-12)
  assert (np.diff(short.steps) > 0).all()
  few = _series(values[:400])
  assert curves.thin(few) is few


def test_svg_is_whole_the_same_each_time_and_changes_nothing_global():
  before = dict(matplotlib.rcParams)
  first, second = (
    curves.svg_bytes(curves.draw('val/psnr', {'run': _metrics()}))
    for _ in range(2)
  )
  assert first == second
  root = ElementTree.fromstring(first)
  assert root.tag.endswith('svg')
  links = [v for e in root.iter() for k, v in e.items() if k.endswith('href')]
  assert all(link.startswith('#') for link in links)
  # The page's ink, which the reader's preference decides.
  assert b'#444444' not in first.replace(b'color: #444444', b'')
  assert b'fill: currentColor' in first
  assert b'prefers-color-scheme: dark' in first
  assert dict(matplotlib.rcParams) == before
  # Another library may have imported pyplot; it must not hold our figures.
  pyplot = sys.modules.get('matplotlib.pyplot')
  assert pyplot is None or not pyplot.get_fignums()
