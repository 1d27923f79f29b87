"""The parts that every transformer here is made of."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

LAYER_NORM_EPSILON = 1e-6
# What fields called `attention` and `dtype` may be.
ATTENTIONS = ('xla', 'cudnn')
DTYPES = ('float32', 'bfloat16')
GELUS = {
  'exact': lambda x: nn.gelu(x, approximate=False),
  'tanh': lambda x: nn.gelu(x, approximate=True),
}


def patchify(
  images: Float[Array, 'b h w c'], patch_size: int
) -> Float[Array, 'b n f']:
  """Cuts images into raster-ordered patches, each flattened as (p, q, c)."""
  b, h, w, c = images.shape
  rows, columns = h // patch_size, w // patch_size
  x = images.reshape(b, rows, patch_size, columns, patch_size, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, rows * columns, patch_size * patch_size * c)


def unpatchify(
  patches: Float[Array, 'b n f'], patch_size: int
) -> Float[Array, 'b h w c']:
  """Inverse of `patchify` for square images."""
  b, n, f = patches.shape
  side = round(n**0.5)
  channels = f // patch_size**2
  x = patches.reshape(b, side, side, patch_size, patch_size, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, side * patch_size, side * patch_size, channels)


def sincos_1d(length: int, width: int) -> Float[np.ndarray, 'k d']:
  """Fixed 1D positions: sines in even columns, cosines in odd ones."""
  # The angles are rounded to float32, as they are in the usual torch code whose
  # tables lie in checkpoints: it tells in the sixth digit.
  exponent = np.arange(0, width, 2, dtype=np.float32)
  exponent = exponent * np.float32(-np.log(10000.0) / width)
  frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
  angle = np.arange(length, dtype=np.float32)[:, None] * frequency
  table = np.zeros((length, width))
  table[:, 0::2] = np.sin(angle)
  table[:, 1::2] = np.cos(angle)[:, : width // 2]
  return table.astype(np.float32)


def sincos_2d(side: int, width: int) -> Float[np.ndarray, 'n d']:
  """Fixed 2D positions of a square grid in raster order.

  The first half of the columns tells the column of the patch, the second half
  its row; each half is sines, then cosines (the table of MAE and DiT). `width`
  is a multiple of 4.
  """
  frequency = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4.0))

  def encode(position):
    angle = position.reshape(-1, 1) * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  row, column = np.meshgrid(np.arange(side), np.arange(side), indexing='ij')
  table = np.concatenate([encode(column), encode(row)], axis=1)
  return table.astype(np.float32)


def rotary_angles(
  grid: tuple[int, ...], head_width: int
) -> Float[np.ndarray, 'n f']:
  """Angles of `rotate` for a sequence (length,) or a grid (rows, columns).

  n positions in raster order, f = head_width / 2. Each axis has an equal share
  of the columns, rows first. `head_width` is a multiple of twice the axes.
  """
  share = head_width // len(grid)
  frequency = 1.0 / 10000 ** (np.arange(0, share, 2) / share)
  axes = np.meshgrid(*(np.arange(size) for size in grid), indexing='ij')
  angles = [axis.reshape(-1, 1) * frequency for axis in axes]
  return np.concatenate(angles, axis=1).astype(np.float32)


def position_table(
  module: nn.Module, name: str, initial: Float[np.ndarray, 'k d']
) -> Float[Array, '1 k d']:
  """A learned table of positions that starts at `initial`."""
  return module.param(name, lambda _: jnp.asarray(initial)[None])


def timestep_features(
  t: Float[Array, ' b'], width: int, max_period: float = 1e4
) -> Float[Array, 'b d']:
  """Sinusoidal features of t, cosines then sines; t is not rescaled."""
  half = width // 2
  frequency = jnp.exp(
    -jnp.log(max_period) * jnp.arange(half, dtype=t.dtype) / half
  )
  angle = t[:, None] * frequency[None]
  features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
  return jnp.pad(features, ((0, 0), (0, width - 2 * half)))


def modulate(
  x: Float[Array, 'b k d'],
  shift: Float[Array, 'b d'],
  scale: Float[Array, 'b d'],
) -> Float[Array, 'b k d']:
  """X (1 + scale) + shift, one shift and scale for all tokens of an image."""
  return x * (1 + scale[:, None]) + shift[:, None]


def unit_rms(x: Float[Array, '*b e']) -> Float[Array, '*b e']:
  """Scales each vector to a root mean square of 1, in float32 or wider."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def dense(features: int, dtype: str, name: str | None = None) -> nn.Dense:
  """A Linear with Xavier-uniform weights and zero biases."""
  return nn.Dense(
    features,
    dtype=dtype,
    kernel_init=nn.initializers.xavier_uniform(),
    name=name,
  )


def layer_norm(dtype: str, name: str | None = None) -> nn.LayerNorm:
  """An affine LayerNorm whose statistics are float32 whatever `dtype` is."""
  return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, name=name)


class Mlp(nn.Module):
  """Linear, GELU, Linear."""

  ratio: float = 4.0
  gelu: str = 'exact'
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'b k d']) -> Float[Array, 'b k d']:
    width = x.shape[-1]
    x = dense(round(width * self.ratio), self.dtype, name='up')(x)
    return dense(width, self.dtype, name='down')(GELUS[self.gelu](x))


class SwiGlu(nn.Module):
  """The gated MLP SiLU(x W1) * (x W2), then a Linear (Shazeer, 2020).

  Its hidden width is two thirds of `ratio` times that of x, so that it has as
  many parameters as an `Mlp`.
  """

  ratio: float = 4.0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'b k d']) -> Float[Array, 'b k d']:
    width = x.shape[-1]
    hidden = int(2 / 3 * int(width * self.ratio))
    both = dense(2 * hidden, self.dtype, name='up')(x)
    gate, value = jnp.split(both, 2, axis=-1)
    return dense(width, self.dtype, name='down')(nn.silu(gate) * value)


class Attention(nn.Module):
  """Multi-head attention of x to itself, or to a context of any width.

  `implementation` is one of jax.nn.dot_product_attention's: 'xla' anywhere,
  'cudnn' on NVIDIA GPUs in 16-bit. The softmax is float32. `qk_norm` is '' or
  one of HEAD_NORMS, of queries and keys, per head. With `angles` queries and
  keys are turned by them, see `rotate`.
  """

  heads: int
  qk_norm: str = ''
  implementation: str = 'xla'
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b k d'],
    context: Float[Array, 'b m _'] | None = None,
    *,
    mask: Bool[Array, 'k m'] | None = None,
    angles: Float[Array, 'k _'] | None = None,
  ) -> Float[Array, 'b k d']:
    width = x.shape[-1]
    if context is None:
      qkv = dense(3 * width, self.dtype, name='qkv')(x)
      q, k, v = jnp.split(qkv, 3, axis=-1)
    else:
      q = dense(width, self.dtype, name='query')(x)
      kv = dense(2 * width, self.dtype, name='key_value')(context)
      k, v = jnp.split(kv, 2, axis=-1)
    q, k, v = (
      a.reshape(*a.shape[:2], self.heads, width // self.heads)
      for a in (q, k, v)
    )
    if self.qk_norm:
      norm = HEAD_NORMS[self.qk_norm]
      q = norm(dtype=self.dtype, name='query_norm')(q)
      k = norm(dtype=self.dtype, name='key_norm')(k)
    if angles is not None:
      q, k = rotate(q, angles), rotate(k, angles)
    out = jax.nn.dot_product_attention(
      q,
      k,
      v,
      mask=None if mask is None else mask[None, None],
      implementation=self.implementation,
    )
    return dense(width, self.dtype, name='out')(out.reshape(x.shape))


# Affine, over the width of a head.
HEAD_NORMS = {
  'layer': functools.partial(nn.LayerNorm, epsilon=1e-5),
  'rms': functools.partial(nn.RMSNorm, epsilon=LAYER_NORM_EPSILON),
}


def rotate(
  x: Float[Array, 'b k h d'], angles: Float[Array, 'k f']
) -> Float[Array, 'b k h d']:
  """Turns neighbouring pairs of columns by one angle each, d = 2 f (RoPE)."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  cos, sin = (
    f(angles.astype(jnp.float32))[None, :, None] for f in (jnp.cos, jnp.sin)
  )
  first, second = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.reshape(x.shape).astype(x.dtype)
