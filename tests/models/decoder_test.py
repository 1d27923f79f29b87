import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import decoder, transformer
from tests import tiny

B, K, E, D = 3, 4, 5, 8


def _groups(count):
  keys = jax.random.split(jax.random.key(0), count)
  return [jax.random.normal(key, (B, K, E)) for key in keys]


def _step(width):
  """A move that a layer norm does not undo, as it does the same for all."""
  return 5 * jax.random.normal(jax.random.key(4), (width,))


@pytest.mark.parametrize('count', [2, 3])
def test_fusion_starts_as_the_global_tokens(count):
  fusion, groups = decoder.Fusion(), _groups(count)
  params = fusion.init(jax.random.key(0), groups)
  assert params['params']['weights'].shape == (count - 1,)
  np.testing.assert_array_equal(fusion.apply(params, groups), groups[0])


def test_fusion_weights_add_up_to_one():
  groups = _groups(3)
  params = {'params': {'weights': jnp.array([0.5, 0.2])}}
  np.testing.assert_allclose(
    decoder.Fusion().apply(params, groups),
    0.5 * groups[0] + 0.2 * groups[1] + 0.3 * groups[2],
    atol=1e-6,
  )
  same = decoder.Fusion().apply(params, [groups[0]] * 3)
  np.testing.assert_allclose(same, groups[0], atol=1e-6)


def test_fusion_of_one_group_and_by_concatenation_learn_nothing():
  groups = _groups(3)
  alone, _ = decoder.Fusion().init_with_output(jax.random.key(0), groups[:1])
  np.testing.assert_array_equal(alone, groups[0])
  joined, params = decoder.Fusion('concat').init_with_output(
    jax.random.key(0), groups
  )
  assert not jax.tree.leaves(params)
  np.testing.assert_array_equal(joined, np.concatenate(groups, axis=1))


@pytest.fixture(scope='module')
def block():
  """A block with two contexts, its inputs, and open gates."""
  x = jax.random.normal(jax.random.key(1), (B, K, D))
  contexts = tuple(
    jax.random.normal(jax.random.key(i), (B, 2 + i, D)) for i in range(2)
  )
  module = decoder.DecoderBlock(2)
  keep = (jnp.ones(B), jnp.ones(B))
  fresh = jax.jit(module.init)(jax.random.key(2), x, contexts, keep)['params']
  return module, x, contexts, fresh


def test_fresh_block_is_a_plain_one(block):
  module, x, contexts, params = block
  keep = (jnp.ones(B),) * 2
  plain = jax.jit(transformer.Block(2).apply)({'params': params['vit']}, x)
  out = jax.jit(module.apply)({'params': params}, x, contexts, keep)
  np.testing.assert_array_equal(out, plain)


def test_an_open_gate_lets_the_kept_contexts_in(block):
  module, x, contexts, params = block
  params = params | {'gate0': jnp.float32(1.0), 'gate1': jnp.float32(-1.0)}
  plain = jax.jit(transformer.Block(2).apply)({'params': params['vit']}, x)
  keep = (jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 1.0]))
  out = jax.jit(module.apply)({'params': params}, x, contexts, keep)
  changed = np.abs(out - plain).max(axis=(1, 2))
  assert changed[0] > 1e-2
  assert changed[2] > 1e-2
  np.testing.assert_array_equal(out[1], plain[1])


@pytest.fixture(scope='module')
def model():
  module = decoder.Decoder(16, 4, 16, 2, 2)
  fused, context = _groups(2)
  params = tiny.noise_for(
    module.init, jax.random.key(3), fused, [context], [jnp.ones(B)]
  )
  return module, tiny.awake(params), fused, context


def test_pixels_depend_on_every_token_and_context(model):
  module, params, fused, context = model

  @jax.jit
  @jax.jacrev
  def jacobian(inputs):
    out = module.apply(params, inputs[0], [inputs[1]], [jnp.ones(B)])
    assert out.shape == (B, 16, 16, 3)
    return jnp.sum(jnp.sin(out), axis=(1, 2, 3))

  for part in jacobian((fused, context)):
    seen = np.abs(part).max(axis=-1) > 0
    expected = np.broadcast_to(np.eye(B, dtype=bool)[..., None], seen.shape)
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize(('size', 'grid'), [((8, 16), (2, 4)), (8, (2, 2))])
def test_pixels_of_rectangles_land_where_their_patch_is(size, grid):
  """The last layer alone, made to paint each patch by its position."""
  module = decoder.Decoder(size, 4, 16, 1, 2)
  fused, _ = _groups(2)
  params = tiny.noise_for(module.init, jax.random.key(3), fused)
  table = params['params']['patch_positions']
  assert table.shape == (1, grid[0] * grid[1], 16)
  for patch in range(grid[0] * grid[1]):
    moved = {'params': params['params'] | {}}
    moved['params']['patch_positions'] = table.at[0, patch].add(_step(16))
    one, two = (module.apply(p, fused) for p in (params, moved))
    assert one.shape == (B, grid[0] * 4, grid[1] * 4, 3)
    change = np.abs(two - one).reshape(B, grid[0], 4, grid[1], 4, 3)
    by_patch = change.mean(axis=(0, 2, 4, 5)).reshape(-1)
    assert by_patch.argmax() == patch
    assert by_patch[patch] > 0.1


def test_pixels_are_float32_and_land_where_their_patch_is(model):
  module, params, fused, context = model
  half = module.clone(dtype='bfloat16')
  out = jax.jit(half.apply)(params, fused, [context], [jnp.ones(B)])
  assert out.dtype == jnp.float32
  # Move one patch's position: its own pixels move most.
  moved = jax.tree.map(lambda a: a, params)
  table = moved['params']['patch_positions']
  moved['params']['patch_positions'] = table.at[0, 6].add(_step(16))
  run = jax.jit(lambda p: module.apply(p, fused, [context], [jnp.ones(B)]))
  change = np.abs(run(moved) - run(params)).reshape(B, 4, 4, 4, 4, 3)
  by_patch = change.mean(axis=(0, 2, 4, 5)).reshape(-1)
  assert by_patch.argmax() == 6
  assert by_patch[6] > 0.1
