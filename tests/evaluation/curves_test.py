import io
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.evaluation import curves, history


def _series(values, every=10):
  return history.Series(
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
  assert dict(matplotlib.rcParams) == before
  # Another library may have imported pyplot; it must not hold our figures.
  pyplot = sys.modules.get('matplotlib.pyplot')
  assert pyplot is None or not pyplot.get_fignums()


def test_png_has_the_size_that_was_asked():
  data = curves.png_bytes(curves.draw('loss', {'run': _metrics()}), 100)
  with Image.open(io.BytesIO(data)) as file:
    assert file.size == (350, 230)
