import os

import jax
import jax.numpy as jnp
import pytest

from selfboottok_jax.pretrained import lpips
from tests.golden import fixtures
from tests.pretrained import weights as weights_lib

pytestmark = pytest.mark.golden


def _backbone(meta):
  if 'channels' in meta:
    return lpips.vgg(tuple(meta['channels']))
  return lpips.BACKBONES[meta['net']]()


@pytest.mark.parametrize('kind', ['squeeze', 'vgg_narrow'])
def test_every_recorded_array(kind):
  name = f'tok06_lpips_{kind}'
  fixture = fixtures.load('tokenizer', name)
  arrays = fixture.arrays
  if not fixture.weights:
    assert 'GOLDEN' not in os.environ, f'no weights beside {name} in GOLDEN'
    pytest.skip(f'{name} has no weights beside its arrays')
  weights = {
    key: array
    for key, array in fixture.weights.items()
    # Constants of the code.
    if not key.startswith('scaling_layer')
  }
  network = weights_lib.lpips_of(weights, _backbone(fixture.meta), name)
  a, b = (
    jnp.asarray(arrays[k].transpose(0, 2, 3, 1))
    for k in ('in_input', 'in_target')
  )

  def mean_distance(target):
    shares = network.per_layer(network.params, a, target)
    return shares.sum(axis=-1).mean(), shares

  step = jax.jit(jax.value_and_grad(mean_distance, has_aux=True))
  (_, shares), gradient = step(b)
  distance = network(network.params, a, b).reshape(-1, 1, 1, 1)
  for array, value in {
    'out_per_layer': shares,
    'out_distance': distance,
    'out_grad_target': gradient.transpose(0, 3, 1, 2),
  }.items():
    fixtures.check(name, array, value, arrays[array])
