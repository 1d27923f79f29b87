"""DiffAug on recorded draws, and its gradient."""

import jax
import jax.numpy as jnp
import pytest

from selfboottok_jax.objectives import diffaug
from tests.golden import diffaug_draws, fixtures

pytestmark = pytest.mark.golden

NAME = 'tok05_diffaug'
CASES = ('all', 'color', 'translation', 'cutout', 'none', 'strong')


@pytest.mark.parametrize('case', CASES)
def test_every_recorded_array(case):
  arrays = fixtures.load('tokenizer', NAME).arrays
  images, weights = (
    jnp.asarray(arrays[name].transpose(0, 2, 3, 1)) for name in ('in_x', 'in_r')
  )
  draws = diffaug_draws.read(arrays, f'in_{case}/')
  strength = diffaug.STRONG if case == 'strong' else diffaug.WEAK

  @jax.jit
  def step(images):
    y, pull = jax.vjp(lambda x: diffaug.augment(x, draws, strength), images)
    return y, pull(weights)[0]

  y, gradient = step(images)
  actual = {'y': y, 'grad_x': gradient}
  recorded = {n for n in arrays if n.startswith(f'out_{case}/')}
  assert f'out_{case}/y' in recorded
  for name in recorded:
    value = actual[name.split('/')[1]].transpose(0, 3, 1, 2)
    fixtures.check(NAME, name, value, arrays[name])


def test_no_recorded_case_is_left_out():
  arrays = fixtures.load('tokenizer', NAME).arrays
  found = {n.split('/')[0] for n in arrays if n.startswith('out_')}
  assert found == {f'out_{case}' for case in CASES}
