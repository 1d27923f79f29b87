import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import placement
from selfboottok_jax.models import transformer
from tests import tiny

DEPTH, PREFIX, QUERIES = 3, 3, 4


BLOCK = functools.partial(transformer.Block, 2)


def _stack(block=BLOCK, **fields):
  return transformer.Stack(block, DEPTH, **fields)


@pytest.fixture(scope='module')
def x():
  return jax.random.normal(jax.random.key(0), (2, PREFIX + QUERIES, 8))


@pytest.fixture(scope='module')
def params(x):
  fresh = jax.jit(_stack().init)(jax.random.key(1), x)
  assert (
    len(np.unique(fresh['params']['block']['mlp']['up']['kernel'][:, 0, 0]))
    == DEPTH
  )
  return tiny.awake(fresh)


def test_mask_of_a_prefix_and_queries():
  np.testing.assert_array_equal(
    transformer.prefix_causal_mask(2, 3),
    np.array(
      [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
      ],
      bool,
    ),
  )
  both_ways = transformer.prefix_causal_mask(2, 3, causal=False)
  np.testing.assert_array_equal(both_ways[:2, 2:], False)
  np.testing.assert_array_equal(both_ways[2:], True)


def test_stack_is_its_blocks_in_a_row(params, x):
  block = jax.jit(BLOCK().apply)
  expected = x
  for i in range(DEPTH):
    layer = jax.tree.map(lambda a, i=i: a[i], params['params']['block'])
    expected = block({'params': layer}, expected)
  np.testing.assert_allclose(
    jax.jit(_stack().apply)(params, x), expected, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  'fields',
  [
    pytest.param({'remat': 'dots'}, marks=pytest.mark.slow),
    pytest.param({'remat': True}, marks=pytest.mark.slow),
    pytest.param({'unroll': 2}, marks=pytest.mark.slow),
    {'unroll': 99, 'remat': 'block'},
  ],
)
def test_remat_and_unroll_change_neither_values_nor_gradients(
  params, x, fields
):
  mask = transformer.prefix_causal_mask(PREFIX, QUERIES)

  def run(fields):
    stack = _stack(**fields)
    return jax.jit(
      jax.value_and_grad(
        lambda p: jnp.sum(jnp.sin(stack.apply(p, x, mask))), argnums=0
      )
    )(params)

  plain, other = run({'unroll': 1}), run(fields)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('unroll', 'depth', 'on_cpu', 'elsewhere'),
  [(0, 12, 12, 1), (0, 16, 16, 1), (0, 28, 1, 1), (4, 28, 4, 4), (9, 2, 2, 2)],
)
def test_blocks_per_iteration_depend_on_the_platform(
  unroll, depth, on_cpu, elsewhere
):
  per_iteration = transformer.blocks_per_iteration
  assert per_iteration(unroll, depth, 'float32') == on_cpu
  assert per_iteration(unroll, depth, 'bfloat16') == elsewhere
  for name in ('gpu', 'tpu'):
    with placement.assume_platform(name):
      assert per_iteration(unroll, depth, 'float32') == elsewhere


def test_a_stack_keeps_the_type_of_its_residual_stream(params, x):
  stack = _stack(functools.partial(BLOCK, dtype='bfloat16'), dtype='bfloat16')
  for dtype in ('bfloat16', 'float32'):
    out = jax.eval_shape(stack.apply, params, x.astype(dtype))
    assert out.dtype == dtype


@pytest.mark.parametrize('causal', [True, False])
def test_prefix_never_sees_the_queries(params, x, causal):
  mask = transformer.prefix_causal_mask(PREFIX, QUERIES, causal=causal)
  apply = jax.jit(_stack().apply)
  out = apply(params, x, mask)
  # Not the same for all channels, which the layer norm would undo.
  moves = 3 * jax.random.normal(jax.random.key(7), x[:, PREFIX:].shape)
  other = apply(params, x.at[:, PREFIX:].add(moves), mask)
  np.testing.assert_array_equal(out[:, :PREFIX], other[:, :PREFIX])
  assert np.abs(out[:, PREFIX:] - other[:, PREFIX:]).min() > 0


def test_layer_scale_is_the_gain_of_each_branch(x):
  block = functools.partial(transformer.Block, 2, layer_scale=1e-5)
  stack = _stack(block)
  # How it starts is what is tested.
  params = jax.jit(stack.init)(jax.random.key(1), x)
  np.testing.assert_array_equal(
    params['params']['block']['scale1'], np.full((DEPTH, 8), 1e-5, np.float32)
  )
  # So small a gain leaves the input as it is; at zero there is no block.
  apply = jax.jit(stack.apply)
  np.testing.assert_allclose(apply(params, x), x, atol=2e-3)
  silent = jax.tree.map(lambda a: a, params)
  for name in ('scale1', 'scale2'):
    silent['params']['block'][name] = jnp.zeros((DEPTH, 8))
  np.testing.assert_array_equal(apply(silent, x), x)
  assert (
    'scale1' not in transformer.Block(2).init(jax.random.key(0), x)['params']
  )


def test_segments_end_at_taps():
  four = [(0, 3), (3, 6), (6, 9), (9, 12)]
  assert transformer.segments(12, (3, 6, 9, 12)) == four
  assert transformer.segments(4, (0, 1)) == [(0, 1), (1, 4)]
  assert transformer.segments(2, ()) == [(0, 2)]


@pytest.mark.parametrize(
  ('value', 'expected'),
  [
    *(('none', 'none'), ('dots', 'dots'), ('block', 'block')),
    # Of runs and command lines of earlier versions.
    *((False, 'none'), (True, 'block'), ('False', 'none'), ('true', 'block')),
    ('all', 'all'),
  ],
)
def test_values_of_remat(value, expected):
  assert transformer.remat_of(value) == expected
  assert (expected in transformer.REMATS) == (value != 'all')
