import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import (
  contract,
  inception,
  inception_weights,
)


def _images(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.uniform(-1, 1, (*shape, 3)), jnp.float32)


@pytest.fixture(scope='module')
def network():
  return inception.Inception()


@pytest.fixture(scope='module')
def params(network):
  return network.init(jax.random.key(0))


def test_keeps_the_contracts(network):
  assert isinstance(network, contract.FeatureNetwork)
  assert isinstance(network, contract.Weighted)
  assert network.published is inception_weights.PUBLISHED
  assert network.grid(64) == network.grid(256) == (8, 8)


def test_features_of_any_image(network, params):
  features = jax.jit(network.__call__)(params, _images(2, 20, 31))
  assert features.patches.shape == (2, 64, network.dim)
  assert features.cls.shape == (2, 2048)
  np.testing.assert_allclose(
    features.cls, features.patches.mean(axis=1), rtol=1e-5, atol=1e-6
  )
  one, other = np.asarray(features.cls)
  assert np.abs(one - other).max() > 1e-2
  assert 0.01 < one.mean() < 100


def test_scores_read_the_classifier_without_and_with_its_bias(network, params):
  bias = np.linspace(-1, 1, 1008, dtype=np.float32)
  params = params | {'fc': params['fc'] | {'bias': bias}}
  measured = jax.jit(network.measure)(params, _images(1, 40, 40))
  assert {w: x.shape[1] for w, x in measured.pooled.items()} == {
    w: w for w in (64, 192, 768, 2048)
  }
  np.testing.assert_allclose(
    measured.logits - measured.logits_unbiased, bias[None], atol=1e-5
  )
  kernel = np.asarray(params['fc']['kernel'])
  np.testing.assert_allclose(
    measured.logits_unbiased,
    np.asarray(measured.pooled[2048]) @ kernel,
    rtol=1e-4,
    atol=1e-5,
  )
  # Row, column, channel.
  assert measured.spatial.shape == (1, 2023)
  np.testing.assert_array_equal(
    measured.spatial[0, 7 * (3 * 17 + 5) : 7 * (3 * 17 + 5) + 7],
    measured.activations['Mixed_6d'][0, 3, 5, :7],
  )


def test_random_parameters_cost_nothing_but_shapes(network):
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  ones = {
    name: np.broadcast_to(np.float32(1), shape)
    for name, shape in inception_weights.shapes().items()
  }
  # As those of a file.
  read = network.read(ones, 'test')
  assert jax.tree.map(jnp.shape, read) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize(
  ('resize', 'lowest', 'highest'),
  [('tf1', -1, 127 / 128), ('half_pixel', -1, 1)],
)
def test_range_of_what_the_first_layer_sees(resize, lowest, highest):
  prepare = inception.Inception(resize).prepare
  for value, expected in ((-1, lowest), (1, highest)):
    flat = prepare(jnp.full((1, 7, 9, 3), value, jnp.float32))
    assert flat.shape == (1, 299, 299, 3)
    np.testing.assert_allclose(flat, expected, atol=1e-6)


def test_an_image_of_its_own_size_is_not_resampled():
  image = _images(1, 299, 299)
  seen = inception.Inception('half_pixel').prepare(image)
  np.testing.assert_allclose(seen, image, atol=1e-6)
  seen = inception.Inception('tf1').prepare(image)
  np.testing.assert_allclose(seen * 128 + 128, (image + 1) * 127.5, atol=1e-4)


def test_only_half_pixel_centres_treat_both_ends_alike():
  image = _images(1, 50, 64)
  for resize, alike in (('half_pixel', True), ('tf1', False)):
    prepare = inception.Inception(resize).prepare
    turned = prepare(image[:, ::-1, ::-1])[:, ::-1, ::-1]
    assert np.allclose(turned, prepare(image), atol=1e-4) is alike


def test_nothing_is_rounded():
  prepare = inception.Inception().prepare
  slope = jax.grad(lambda x: prepare(x).sum())(jnp.zeros((1, 20, 20, 3)))
  assert float(slope.min()) > 0


def test_an_unknown_resize_lists_the_others():
  with pytest.raises(errors.UserError, match="'pil'.* tf1, half_pixel"):
    inception.Inception('pil')
