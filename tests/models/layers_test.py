import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, placement
from selfboottok_jax.models import layers, transformer
from selfboottok_jax.training import sharding


def _normal(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def _init(module, *inputs):
  return jax.jit(module.init)(jax.random.key(0), *inputs)


def test_patches_are_in_raster_order_and_come_back():
  images = jnp.arange(2 * 6 * 6 * 3, dtype=jnp.float32).reshape(2, 6, 6, 3)
  patches = layers.patchify(images, 2)
  assert patches.shape == (2, 9, 12)
  # The second patch lies right of the first one, the fourth below it.
  np.testing.assert_array_equal(patches[1, 1], images[1, 0:2, 2:4].reshape(-1))
  np.testing.assert_array_equal(patches[1, 3], images[1, 2:4, 0:2].reshape(-1))
  np.testing.assert_array_equal(layers.unpatchify(patches, 2), images)


def test_patchify_takes_rectangles():
  images = _normal(1, 4, 8, 1)
  patches = layers.patchify(images, 4)
  np.testing.assert_array_equal(patches[0, 1], images[0, :, 4:].reshape(-1))


def test_patches_of_rectangles_come_back_by_their_grid():
  images = _normal(2, 6, 4, 3)
  patches = layers.patchify(images, 2)
  np.testing.assert_array_equal(patches[1, 2], images[1, 2:4, :2].reshape(-1))
  back = layers.unpatchify(patches, 2, (3, 2))
  np.testing.assert_array_equal(back, images)
  # By their number alone, six could be anything.
  with pytest.raises(ValueError, match='6 patches are no square'):
    layers.unpatchify(patches, 2)


@pytest.mark.parametrize('width', [8, 7])
def test_sincos_1d(width):
  table = layers.sincos_1d(5, width)
  assert table.dtype == np.float32
  for column in range(width):
    angle = np.arange(5) * 1e4 ** (-(column - column % 2) / width)
    expected = np.cos(angle) if column % 2 else np.sin(angle)
    np.testing.assert_allclose(table[:, column], expected, atol=1e-6)


def test_sincos_2d_tells_column_then_row():
  side, width = 4, 16
  table = layers.sincos_2d(side, width).reshape(side, side, width)
  column, row = np.split(table, 2, axis=-1)
  np.testing.assert_array_equal(column[0], column[2])
  np.testing.assert_array_equal(row[:, 0], row[:, 2])
  np.testing.assert_array_equal(column[0], row[:, 0])
  np.testing.assert_allclose(column[0, 1, 0], np.sin(1.0), rtol=1e-6)
  np.testing.assert_allclose(column[0, 1, 4], np.cos(1.0), rtol=1e-6)
  assert len(np.unique(table.reshape(-1, width), axis=0)) == side**2


@pytest.mark.parametrize('grid', [(3, 5), (5, 3), (1, 4)])
def test_sincos_2d_of_a_rectangle_is_part_of_a_squares(grid):
  rows, columns = grid
  square = layers.sincos_2d(5, 16).reshape(5, 5, 16)
  table = layers.sincos_2d(grid, 16)
  np.testing.assert_array_equal(
    table, square[:rows, :columns].reshape(rows * columns, 16)
  )


def test_position_table_is_learned_from_its_start():
  start = layers.sincos_1d(3, 4)

  class Holder(nn.Module):
    @nn.compact
    def __call__(self):
      return layers.position_table(self, 'table', start)

  variables = Holder().init(jax.random.key(0))
  np.testing.assert_array_equal(variables['params']['table'][0], start)


def test_timestep_features():
  t = jnp.array([0.0, 0.5])
  features = layers.timestep_features(t, 7)
  np.testing.assert_array_equal(features[0], [1, 1, 1, 0, 0, 0, 0])
  frequency = 1e4 ** (-np.arange(3) / 3)
  np.testing.assert_allclose(
    features[1, :3], np.cos(0.5 * frequency), rtol=1e-5
  )
  np.testing.assert_allclose(
    features[1, 3:6], np.sin(0.5 * frequency), rtol=1e-5
  )


def test_modulate_is_per_image():
  x, shift, scale = _normal(2, 3, 4), _normal(2, 4, seed=1), _normal(2, 4)
  out = layers.modulate(x, shift, scale)
  np.testing.assert_allclose(
    out[1, 2], x[1, 2] * (1 + scale[1]) + shift[1], rtol=1e-6
  )


def test_unit_rms():
  x = 7 * _normal(3, 2, 5)
  out = layers.unit_rms(x)
  np.testing.assert_allclose(np.mean(out**2, axis=-1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(layers.unit_rms(3 * x), out, rtol=1e-5)
  assert layers.unit_rms(x.astype(jnp.bfloat16)).dtype == jnp.float32
  gradient = jax.grad(lambda x: layers.unit_rms(x).sum())(jnp.zeros((2, 3)))
  assert np.all(np.isfinite(gradient))


def test_dense_starts_xavier_uniform_without_bias():
  params = _init(layers.dense(40, 'float32'), _normal(1, 20))['params']
  bound = np.sqrt(6 / (20 + 40))
  assert 0.9 * bound < np.abs(params['kernel']).max() <= bound
  np.testing.assert_array_equal(params['bias'], 0.0)


def test_layer_norm_keeps_statistics_wide():
  # In bfloat16 the mean of values near 100 is off by more than their spread.
  x = 100 + _normal(2, 3, 64)
  norm = layers.layer_norm('float32')
  out = norm.apply(_init(norm, x), x)
  np.testing.assert_allclose(np.mean(out, axis=-1), 0.0, atol=1e-4)
  np.testing.assert_allclose(np.std(out, axis=-1), 1.0, rtol=1e-3)
  low = x.astype(jnp.bfloat16)
  half = layers.layer_norm('bfloat16')
  wide = norm.apply(_init(norm, x), low.astype(jnp.float32))
  narrow = half.apply(_init(half, low), low)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_allclose(narrow.astype(jnp.float32), wide, atol=0.03)


def test_mlp_uses_the_named_gelu():
  x = 2 * _normal(1, 3, 4)
  params = _init(layers.Mlp(), x)
  assert params['params']['up']['kernel'].shape == (4, 16)
  exact, *others = (
    layers.Mlp(gelu=name).apply(params, x) for name in layers.GELUS
  )
  for other in others:
    assert 1e-6 < np.abs(exact - other).max() < 0.1


ATTENTION = layers.Attention(2)


@functools.partial(jax.jit, static_argnums=0)
def _run(module, params, *inputs):
  return module.apply(params, *inputs)


@pytest.fixture(scope='module')
def attended():
  x = _normal(2, 5, 8)
  return x, _init(ATTENTION, x)


def test_attention_is_equivariant_without_a_mask(attended):
  x, params = attended
  order = np.array([3, 1, 0, 4, 2])
  out = _run(ATTENTION, params, x)
  np.testing.assert_allclose(
    _run(ATTENTION, params, x[:, order]), out[:, order], atol=1e-5
  )


def test_mask_hides_what_is_false(attended):
  x, params = attended
  mask = jnp.tril(jnp.ones((5, 5), bool))
  jacobian = jax.jit(
    jax.jacrev(lambda x: ATTENTION.apply(params, x, mask=mask).sum((0, 2)))
  )(x)
  seen = np.abs(jacobian).max(axis=(1, 3)) > 0
  np.testing.assert_array_equal(seen, mask)


def test_attention_reads_a_context_of_any_width(attended):
  x, _ = attended
  context = _normal(2, 3, 6, seed=1)
  params = _init(ATTENTION, x, context)
  assert set(params['params']) == {'query', 'key_value', 'out'}
  apply = functools.partial(_run, ATTENTION, params, x)
  assert apply(context).shape == x.shape
  # A set without order, to whom every member matters.
  np.testing.assert_allclose(apply(context[:, ::-1]), apply(context), atol=1e-5)
  assert np.abs(apply(context[:, :2]) - apply(context)).max() > 1e-3


def test_qk_norm_is_blind_to_the_scale_of_queries_and_keys():
  module, x = layers.Attention(2, qk_norm='layer'), _normal(2, 5, 8)
  params = _init(module, x)
  scale = jnp.concatenate([jnp.full(16, 9.0), jnp.ones(8)])
  grown = jax.tree.map(lambda a: a, params)
  kernel = grown['params']['qkv']['kernel']
  grown['params']['qkv']['kernel'] = kernel * scale[None]
  np.testing.assert_allclose(
    _run(module, grown, x), _run(module, params, x), atol=2e-3
  )
  plain = {k: v for k, v in params['params'].items() if 'norm' not in k}
  larger = {k: v for k, v in grown['params'].items() if 'norm' not in k}
  without = _run(ATTENTION, {'params': plain}, x)
  assert np.abs(_run(ATTENTION, {'params': larger}, x) - without).max() > 0.1


@pytest.mark.parametrize(('queries', 'keys'), [(5, 7), (6, 5), (5, 6), (6, 8)])
@pytest.mark.parametrize('masked', [False, True])
def test_padding_to_even_lengths_changes_nothing(queries, keys, masked):
  rng = np.random.default_rng(0)
  q, cotangent = rng.normal(size=(2, 2, queries, 3, 8)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, keys, 3, 8)).astype(np.float32)
  mask = None
  if masked:
    mask = jnp.asarray(np.tril(np.ones((queries, keys), bool)))

  @functools.partial(jax.jit, static_argnums=0)
  def both(attend, q, k, v):
    value, pull = jax.vjp(attend, q, k, v)
    return value, *pull(cotangent)

  plain = both(lambda *a: layers.attend(*a, mask, 'xla'), q, k, v)
  padded = both(lambda *a: layers._attend_in_pairs(*a, mask, 'xla'), q, k, v)
  for found, wanted in zip(padded, plain, strict=True):
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.fixture
def gpu(monkeypatch):
  """Tracing for cuDNN asks for a GPU, and needs none."""
  kernels = 'jax._src.cudnn.fused_attention_stablehlo'
  monkeypatch.setattr(f'{kernels}.check_cudnn_version', lambda: 91000)
  for name in ('check_compute_capability', 'is_cuda_compute_capability_equal'):
    monkeypatch.setattr(
      f'{kernels}.{name}', lambda *_, name=name, **__: name.startswith('check')
    )
  device = types.SimpleNamespace(
    platform='gpu',
    device_kind='NVIDIA H100 80GB HBM3',
    compute_capability='9.0',
  )
  monkeypatch.setattr(layers.jax, 'devices', lambda: [device])
  with placement.assume_platform('gpu'):
    yield device


def _is_fused(heads, width, dtype, *, implementation='auto', masked=False):
  """Whether cuDNN computes the attention of 65 tokens, and its gradient."""

  def loss(x):
    q = x.reshape(2, 65, heads, width // heads)
    mask = jnp.tril(jnp.ones((65, 65), bool)) if masked else None
    out = layers.attend(q, q, q, mask, implementation)
    return out.astype(jnp.float32).sum()

  x = jax.ShapeDtypeStruct((2, 65, width), dtype)
  text = str(jax.make_jaxpr(jax.grad(loss))(x))
  return 'dot_product_attention_bwd_wrapper' in text


def test_auto_takes_flash_attention_wherever_it_can(gpu):
  for masked in (False, True):
    assert _is_fused(16, 1152, jnp.bfloat16, masked=masked)
  assert not _is_fused(16, 1152, jnp.bfloat16, implementation='xla')
  assert not _is_fused(16, 1152, jnp.float32)
  assert not _is_fused(1, 512, jnp.bfloat16)
  assert not _is_fused(2, 24, jnp.bfloat16)
  gpu.compute_capability = '7.5'
  assert not _is_fused(16, 1152, jnp.bfloat16)


def test_cudnn_says_what_it_cannot(gpu):
  with pytest.raises(errors.ConfigError, match='float32: it takes 16 bits'):
    _is_fused(16, 1152, jnp.float32, implementation='cudnn')
  with pytest.raises(errors.ConfigError, match='heads of 512.*up to 128'):
    _is_fused(1, 512, jnp.bfloat16, implementation='cudnn')
  gpu.platform = 'cpu'
  with pytest.raises(errors.ConfigError, match='needs an NVIDIA GPU'):
    _is_fused(16, 1152, jnp.bfloat16, implementation='cudnn')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('queries', 'keys'),
  [(130, 70), pytest.param(321, 321, marks=pytest.mark.long)],
)
def test_attention_in_tiles_is_that_of_xla(queries, keys):
  rng = np.random.default_rng(0)
  q, cotangent = rng.normal(size=(2, 2, queries, 1, 24)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, keys, 1, 24)).astype(np.float32)

  def both(attend):
    value, pull = jax.vjp(attend, q, k, v)
    return value, *pull(cotangent)

  tiles = functools.partial(layers._attend_in_tiles, interpret=True)
  xla = functools.partial(layers.attend, implementation='xla')
  for found, wanted in zip(both(tiles), both(xla), strict=True):
    np.testing.assert_allclose(found, wanted, atol=3e-6)


def _is_tiled(
  length,
  *,
  implementation='auto',
  masked=False,
  batch=8,
  dtype='bfloat16',
  width=64,
):
  """Returns True if a TPU's kernel computes attention and its gradient."""
  mask = jnp.tril(jnp.ones((length, length), bool)) if masked else None

  def loss(q):
    out = layers.attend(q, q, q, mask, implementation)
    return out.astype(jnp.float32).sum()

  q = jax.ShapeDtypeStruct((batch, length, 2, width), dtype)
  with placement.assume_platform('tpu'):
    text = str(jax.make_jaxpr(jax.grad(loss))(q))
  return 'splash_mha_dkv' in text


def test_tpus_attend_to_long_sequences_in_tiles():
  with jax.set_mesh(sharding.make_mesh()):
    assert _is_tiled(257)
    assert not _is_tiled(257, implementation='xla')
    # Its products round float32, and its blocks are of limited size.
    assert not _is_tiled(257, dtype='float32')
    assert not _is_tiled(257, width=512)
    # Mostly padding.
    assert not _is_tiled(65)
    assert _is_tiled(65, implementation='splash')
    assert not _is_tiled(257, implementation='splash', masked=True)
    # A single image, as at initialisation, is on all devices.
    assert not _is_tiled(257, implementation='splash', batch=1)
  assert not _is_tiled(257, implementation='splash')


def test_splash_needs_a_tpu():
  q = jnp.zeros((1, 4, 2, 8))
  with pytest.raises(errors.ConfigError, match=r'splash for 4 .*needs a TPU'):
    layers.attend(q, q, q, implementation='splash')
  with (
    placement.assume_platform('tpu'),
    pytest.raises(errors.ConfigError, match=r'splash .*it takes 16 bits'),
  ):
    layers.attend(q, q, q, implementation='splash')


def test_cast_layers_compute_the_same_bits():
  block = transformer.Block(2, dtype='bfloat16')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 16)), 'bfloat16')
  params = jax.jit(block.init)(jax.random.key(0), x)['params']
  cast = layers.cast_dense(params, 'bfloat16')
  assert cast['attn']['qkv']['kernel'].dtype == jnp.bfloat16
  assert cast['mlp']['up']['bias'].dtype == jnp.bfloat16
  assert cast['norm1']['scale'].dtype == jnp.float32
  apply = jax.jit(block.apply)
  np.testing.assert_array_equal(
    apply({'params': params}, x), apply({'params': cast}, x)
  )
