import os

import jax
import jax.numpy as jnp
import pytest

from selfboottok_jax.pretrained import lpips
from tests.golden import fixtures

NAME = 'tok06_lpips_squeeze'


@pytest.mark.golden
def test_lpips_squeeze():
  fixture = fixtures.load('tokenizer', NAME)
  arrays = fixture.arrays
  if not fixture.weights:
    assert 'GOLDEN' not in os.environ, f'no weights beside {NAME} in GOLDEN'
    pytest.skip(f'{NAME} has no weights beside its arrays')
  network = lpips.from_package(fixture.weights)
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
    fixtures.check(NAME, array, value, arrays[array])
