import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.pretrained import vit

FIELDS = {'grid': (2, 3), 'patch_size': 4, 'width': 16, 'depth': 3}
MORE = {'heads': 2, 'hidden': 32}
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1)


def _run(**fields):
  network = vit.Vit(**FIELDS | MORE | fields)
  params = network.init(jax.random.key(1), IMAGES)
  return network.apply(params, IMAGES), params


def test_taps_are_the_tokens_between_blocks():
  output, params = _run(taps=(0, 2, 3), registers=2)
  assert set(params['params']) >= {'blocks_0', 'blocks_2'}
  assert list(output.hidden) == [0, 2, 3]
  for hidden in output.hidden.values():
    assert hidden.shape == (2, 1 + 2 + 6, 16)
  normed = (output.hidden[3] - output.hidden[3].mean(-1, keepdims=True)) / (
    output.hidden[3].std(-1, keepdims=True)
  )
  np.testing.assert_allclose(output.patches, normed[:, 3:], atol=1e-3)
  np.testing.assert_allclose(output.summary, normed[:, 0], atol=1e-3)


@pytest.mark.parametrize(
  ('fields', 'has_summary'),
  [({}, True), ({'cls': False}, False), ({'cls': False, 'pool': True}, True)],
)
def test_summary_is_there_where_something_makes_it(fields, has_summary):
  output, _ = _run(**fields)
  assert output.patches.shape == (2, 6, 16)
  assert (output.summary is not None) == has_summary


def test_images_of_another_size_are_refused():
  network = vit.Vit(**FIELDS | MORE)
  with pytest.raises(ValueError, match='wanted a grid of 2 x 3'):
    network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_bfloat16_computes_nearby_and_returns_float32():
  full, params = _run()
  half = vit.Vit(**FIELDS | MORE, dtype='bfloat16').apply(params, IMAGES)
  assert half.patches.dtype == half.summary.dtype == jnp.float32
  np.testing.assert_allclose(half.patches, full.patches, atol=0.1)
