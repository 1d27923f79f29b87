import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import pretrained
from selfboottok_jax.evaluation import codes, transport_health
from selfboottok_jax.models import aligners, tokenizer
from selfboottok_jax.objectives import transport
from tests import tiny

DIM = 6


@pytest.fixture(scope='module')
def network():
  return pretrained.load_network('random', patch_size=4, dim=DIM)


def _output(tokens):
  nothing = jnp.zeros((len(tokens), 1, 1, 3))
  return tokenizer.TokenizerOutput(nothing, tokens, {'local2d': tokens}, {})


@pytest.mark.parametrize(
  'width', [4, pytest.param(DIM, marks=pytest.mark.slow)]
)
def test_each_image_has_its_own_plan(network, width):
  images = tiny.images(3)
  tokens = jnp.asarray(
    np.random.default_rng(0).normal(size=(3, 5, width)).astype(np.float32)
  )
  head, params, projected = None, {}, tokens
  if width != DIM:
    head = aligners.Projector(DIM, 8)
    params = head.init(jax.random.key(0), tokens)['params']
    projected = head.apply({'params': params}, tokens)
  health = transport_health.Health(network, head, params, 0.05, 20)
  found = health(health.params, images, _output(tokens))
  patches = network(network.params, images).patches
  for i in range(3):
    alone = transport.transport_loss(
      patches[i : i + 1], projected[i : i + 1], num_iterations=20
    )
    for name, value in {
      'transport_token_spread': alone.spread,
      'transport_plan_spread': alone.plan_spread,
      'transport_marginal_error': alone.marginal_error,
    }.items():
      np.testing.assert_allclose(found[name][i], value, rtol=1e-4, atol=1e-6)


def test_padding_does_not_count():
  counted = codes.CodeStatistics([transport_health.METRIC])
  for values, mask in (([1.0, 2.0], [True, True]), ([6.0, 9.0], [True, False])):
    health = dict.fromkeys(transport_health.PROTOCOLS, np.array(values))
    counted.add({}, np.array(mask), health)
  found = {name: value for name, value, _ in counted.finish()}
  assert found == dict.fromkeys(transport_health.PROTOCOLS, 3.0)
