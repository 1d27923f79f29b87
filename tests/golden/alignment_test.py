"""REPA alignment against the reference's three pairings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.objectives import alignment
from tests.golden import fixtures, rounding

pytestmark = pytest.mark.golden

NAME = 'tok04_align'
SUFFIXES = {'repeat': '', 'pool': '_avg_1d', 'global': '_global'}


@pytest.fixture(scope='module')
def recorded():
  return fixtures.load('tokenizer', NAME)


@pytest.fixture(scope='module')
def params(recorded):
  return {name: jnp.asarray(value) for name, value in recorded.weights.items()}


def project(params, x):
  """Linear, SiLU, ..., Linear, from torch's [out, in] weights."""
  layers = sorted({name.rsplit('.', 1)[0] for name in params})
  with jax.default_matmul_precision('highest'):
    for i, layer in enumerate(layers):
      x = jax.nn.silu(x) if i else x
      bias = params[f'{layer}.bias'][None, None]
      x = x @ params[f'{layer}.weight'].T + bias
  return x


def loss(params, tokens, recorded, mode):
  if mode == 'global':
    tokens = jnp.mean(tokens, axis=1, keepdims=True)
  value = alignment.alignment_loss(
    jnp.asarray(recorded.arrays['in_teacher']),
    project(params, tokens),
    mode=mode,
  )
  return recorded.meta['weight'] * value


@pytest.mark.parametrize('mode', list(alignment.ALIGNMENTS))
def test_loss_and_gradients(recorded, params, mode):
  arrays, suffix = recorded.arrays, SUFFIXES[mode]
  value, (of_params, of_tokens) = jax.value_and_grad(loss, argnums=(0, 1))(
    params, jnp.asarray(arrays['in_tokens']), recorded, mode
  )
  expected = {
    f'out_loss{suffix}': value,
    f'out_grad_tokens{suffix}': of_tokens,
  }
  if mode == 'repeat':
    expected |= {f'out_grad/{name}': g for name, g in of_params.items()}
    named = {name for name in arrays if name.startswith('out_grad/')}
    assert named <= set(expected)
  error = _rounding(recorded)
  array = f'out_loss{suffix}'
  value = expected.pop(array)
  fixtures.check_rounding(f'{NAME}:{array}', value, arrays[array], error)
  # The other pairings.
  for other in SUFFIXES.values():
    if other != suffix:
      wrong = arrays[f'out_loss{other}']
      assert fixtures.excess(wrong, arrays[array], error) > 1000
  for name, actual in expected.items():
    fixtures.check(NAME, name, actual, arrays[name])


def _rounding(recorded):
  """Bounds the error of the loss: a three-layer projector, then cosines."""
  width, meta = recorded.arrays['in_teacher'].shape[-1], recorded.meta
  inputs = [
    w.shape[1] for n, w in recorded.weights.items() if n.endswith('.weight')
  ]
  assert len(inputs) == 3
  return meta['weight'] * rounding.mean_cosine(width, *inputs)


def test_projection(recorded, params):
  actual = project(params, jnp.asarray(recorded.arrays['in_tokens']))
  expected = recorded.arrays['out_projected']
  fixtures.check(NAME, 'out_projected', np.asarray(actual), expected)
