"""Building blocks shared by every transformer in this package."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from selfboottok_jax import errors, placement, sizes

LAYER_NORM_EPSILON = 1e-6
# Accepted values of every module field called `attention` or `dtype`.
ATTENTIONS = ('auto', 'xla', 'cudnn', 'splash')
DTYPES = ('float32', 'bfloat16')
# Platforms of those implementations of attention that take 16 bits alone.
PLATFORMS = {'cudnn': 'gpu', 'splash': 'tpu'}
# Accepted values of every field called `residual_dtype`; '' is `dtype`. In
# float32, what blocks in bfloat16 add up keeps 24 bits instead of 8, as under
# torch's autocast; it takes twice the memory.
RESIDUAL_DTYPES = ('', 'float32')
# Released checkpoints differ in which of the two they were trained with.
GELUS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'exact': lambda x: nn.gelu(x, approximate=False),
  'tanh': lambda x: nn.gelu(x, approximate=True),
  # CLIP's.
  'quick': lambda x: x * nn.sigmoid(1.702 * x),
}


def patchify(
  images: Float[Array, 'b h w c'], patch_size: int
) -> Float[Array, 'b n f']:
  """Cuts images into patches in raster order.

  Each patch is flattened row by row, channels last: f = patch_size ** 2 * c.
  """
  b, h, w, c = images.shape
  rows, columns = h // patch_size, w // patch_size
  # Split each image axis into (patch, pixel within it), then bring the two
  # patch axes together: that is raster order.
  x = images.reshape(b, rows, patch_size, columns, patch_size, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, rows * columns, patch_size * patch_size * c)


def unpatchify(
  patches: Float[Array, 'b n f'],
  patch_size: int,
  grid: tuple[int, int] | None = None,
) -> Float[Array, 'b h w c']:
  """Reassembles images from patches; the inverse of `patchify`.

  `grid` is rows and columns of patches, None for those of a square image.
  """
  b, n, f = patches.shape
  rows, columns = grid or square_grid(n)
  channels = f // patch_size**2
  # Swapping axes 2 and 3 undoes itself, so this is the transpose of `patchify`.
  x = patches.reshape(b, rows, columns, patch_size, patch_size, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, rows * patch_size, columns * patch_size, channels)


def square_grid(count: int) -> tuple[int, int]:
  """Rows and columns of a square of `count` patches; ValueError for none."""
  side = math.isqrt(count)
  if side**2 != count:
    raise ValueError(f'{count} patches are no square; wanted their grid')
  return side, side


def sincos_1d(length: int, width: int) -> Float[np.ndarray, 'k d']:
  """Returns a fixed 1D position table: sines in even columns, cosines in odd.

  This is the encoding of Vaswani et al. (2017), with periods up to 10000.
  """
  # The angles are rounded to float32, as in the usual torch code whose tables
  # are stored in checkpoints; float64 angles differ in the sixth digit.
  exponent = np.arange(0, width, 2, dtype=np.float32)
  exponent = exponent * np.float32(-np.log(10000.0) / width)
  frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
  angle = np.arange(length, dtype=np.float32)[:, None] * frequency
  table = np.zeros((length, width))
  table[:, 0::2] = np.sin(angle)
  # With an odd `width` there is one cosine column fewer than angles.
  table[:, 1::2] = np.cos(angle)[:, : width // 2]
  return table.astype(np.float32)


def sincos_2d(
  grid: int | tuple[int, int], width: int
) -> Float[np.ndarray, 'n d']:
  """Returns a fixed 2D position table of a grid, in raster order.

  The first half of the features encodes the column of a patch and the second
  half its row; each half is sines, then cosines, as in MAE and DiT. Places are
  counted in patches, so neighbours are as far apart in every grid.

  Args:
    grid: rows and columns, or one number for both.
    width: features, a multiple of 4.
  """
  rows, columns = sizes.pair(grid)
  # Half of the features per axis, and half of those for the sines.
  frequency = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4.0))

  def encode(position: np.ndarray) -> np.ndarray:
    angle = position.reshape(-1, 1) * frequency
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing='ij')
  # MAE's meshgrid returns columns before rows, and its table follows it.
  table = np.concatenate([encode(column), encode(row)], axis=1)
  return table.astype(np.float32)


def rotary_angles(
  grid: tuple[int, ...], head_width: int
) -> Float[np.ndarray, 'n f']:
  """Returns the angles, in radians, that `rotate` turns each position by.

  Args:
    grid: a sequence (length,) or a grid (rows, columns).
    head_width: features per attention head, a multiple of 2 * len(grid).

  Returns:
    One row per position in raster order, with f = head_width / 2 angles. Each
    grid axis has an equal share of them, rows first.
  """
  share = head_width // len(grid)
  # One frequency per pair of features, hence the step of 2.
  frequency = 1.0 / 10000 ** (np.arange(0, share, 2) / share)
  axes = np.meshgrid(*(np.arange(size) for size in grid), indexing='ij')
  angles = [axis.reshape(-1, 1) * frequency for axis in axes]
  return np.concatenate(angles, axis=1).astype(np.float32)


def position_table(
  module: nn.Module, name: str, initial: Float[np.ndarray, 'k d']
) -> Float[Array, '1 k d']:
  """Adds a parameter to `module`: a position table starting at `initial`."""
  return module.param(name, lambda _: jnp.asarray(initial)[None])


def timestep_features(
  t: Float[Array, ' b'], width: int, max_period: float = 1e4
) -> Float[Array, 'b d']:
  """Encodes times sinusoidally, cosines then sines (DiT).

  Times are not rescaled: DiT's run to 1000, those of a flow only to 1.
  """
  half = width // 2
  frequency = jnp.exp(
    -jnp.log(max_period) * jnp.arange(half, dtype=t.dtype) / half
  )
  angle = t[:, None] * frequency[None]
  features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
  # An odd width leaves one column over, which stays zero.
  return jnp.pad(features, ((0, 0), (0, width - 2 * half)))


def modulate(
  x: Float[Array, 'b k d'],
  shift: Float[Array, 'b d'],
  scale: Float[Array, 'b d'],
) -> Float[Array, 'b k d']:
  """Returns x * (1 + scale) + shift, the same for all tokens of an image."""
  # The 1 makes a zero-initialised modulation the identity.
  return x * (1 + scale[:, None]) + shift[:, None]


def unit_rms(x: Float[Array, '*b e']) -> Float[Array, '*b e']:
  """Scales each vector to a root mean square of 1, in float32 or wider."""
  # A sum of squares in bfloat16 would keep 8 bits. Promotion gives float32, or
  # float64 where the caller computes in that.
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def precision(dtype: Any) -> jax.lax.Precision | None:
  """Returns the precision of products whose operands have this type.

  Accelerators round the operands of float32 products unless they are asked not
  to: TPUs to bfloat16 (8 bits), NVIDIA GPUs to TF32 (11 bits). A layer that is
  called float32 here computes in float32. Operands of 16 bits are exact as they
  are, so there is nothing to ask for.
  """
  is_wide = jnp.dtype(dtype).itemsize >= 4
  return jax.lax.Precision.HIGHEST if is_wide else None


def dense(features: int, dtype: str, name: str | None = None) -> nn.Dense:
  """Returns a linear layer with Xavier-uniform weights and zero biases."""
  return nn.Dense(
    features,
    dtype=dtype,
    precision=precision(dtype),
    kernel_init=nn.initializers.xavier_uniform(),
    name=name,
  )


def layer_norm(dtype: str, name: str | None = None) -> nn.LayerNorm:
  """Returns an affine LayerNorm; statistics are float32 for any `dtype`."""
  return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=dtype, name=name)


def cast_dense(params: PyTree, dtype: str) -> PyTree:
  """Casts the kernels and biases of all linear layers in a tree.

  For a stack whose linear layers compute in `dtype`: they would cast the same
  numbers at every call, hence no result changes by a bit. Norms keep their
  float32 parameters, which they do read in float32.
  """
  if not isinstance(params, Mapping):
    return params
  if 'kernel' in params:
    return {name: jnp.asarray(a, dtype) for name, a in params.items()}
  return {name: cast_dense(part, dtype) for name, part in params.items()}


class Mlp(nn.Module):
  """The transformer MLP: Linear, GELU, Linear back to the width of x.

  Attributes:
    ratio: hidden width over that of x.
    gelu: a key of GELUS.
    dtype: type of the computation; parameters are float32.
  """

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

  Its hidden width is two thirds of `ratio` times that of x: three matrices
  instead of two then have as many parameters as an `Mlp`.
  """

  ratio: float = 4.0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'b k d']) -> Float[Array, 'b k d']:
    width = x.shape[-1]
    # Truncated, not rounded: released checkpoints have this width.
    hidden = int(2 / 3 * int(width * self.ratio))
    # W1 and W2 in one matrix product, which keeps the accelerator busier.
    both = dense(2 * hidden, self.dtype, name='up')(x)
    gate, value = jnp.split(both, 2, axis=-1)
    return dense(width, self.dtype, name='down')(nn.silu(gate) * value)


class Attention(nn.Module):
  """Multi-head attention of x to itself, or to a context of any width.

  With `angles`, queries and keys are turned by them first (see `rotate`). The
  softmax is computed in float32. `mask` is True where a query (row) may see a
  key (column).

  Attributes:
    heads: number of heads, a divisor of the width of x.
    qk_norm: norm of the queries and keys of each head, a key of HEAD_NORMS; ''
      for none.
    implementation: 'xla' runs anywhere and keeps the matrix of weights in
      memory; 'cudnn' is flash attention, on NVIDIA GPUs with a 16-bit `dtype`;
      'splash' is that of TPUs with a 16-bit `dtype`, where there is no mask and
      each device has whole images (xla elsewhere); 'auto' takes cudnn wherever
      it can, and splash for at least 256 queries and keys.
    dtype: type of the computation; parameters are float32.
  """

  heads: int
  qk_norm: str = ''
  implementation: str = 'auto'
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
      # Fused projections: one large matrix product beats three small ones.
      qkv = dense(3 * width, self.dtype, name='qkv')(x)
      q, k, v = jnp.split(qkv, 3, axis=-1)
    else:
      q = dense(width, self.dtype, name='query')(x)
      kv = dense(2 * width, self.dtype, name='key_value')(context)
      k, v = jnp.split(kv, 2, axis=-1)
    # [b, length, heads, head width], the layout that JAX's attention expects.
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
    out = attend(q, k, v, mask, self.implementation)
    return dense(width, self.dtype, name='out')(out.reshape(x.shape))


def attend(
  q: Float[Array, 'b k h d'],
  k: Float[Array, 'b m h d'],
  v: Float[Array, 'b m h d'],
  mask: Bool[Array, 'k m'] | None = None,
  implementation: str = 'auto',
) -> Float[Array, 'b k h d']:
  """Computes softmax(q k^T / sqrt(d)) v for each head; softmax in float32.

  Args:
    q: queries.
    k: keys.
    v: values.
    mask: True where a query (row) may see a key (column).
    implementation: one of ATTENTIONS, see `Attention`.

  Raises:
    ConfigError: an implementation is asked for that cannot compute this.
  """
  chosen = _choose(implementation, q, k)
  if chosen == 'cudnn':
    return _attend_in_pairs(q, k, v, mask, 'cudnn')
  # The kernel's masks are constants, not arrays, and our masked sequences are
  # too short for it.
  if chosen == 'splash' and mask is None and placement.maps_images(len(q)):
    return placement.map_images(_attend_in_tiles, q, k, v)
  # The function has no argument for it.
  exact = 'highest' if precision(q.dtype) else None
  with jax.default_matmul_precision(exact):
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      # One mask for all images and heads.
      mask=None if mask is None else mask[None, None],
      implementation='xla',
    )


def _choose(
  implementation: str,
  q: Float[Array, 'b k h d'],
  k: Float[Array, 'b m h d'],
) -> str:
  """Decides what computes attention: 'xla', 'cudnn' or 'splash'.

  Raises:
    ConfigError: see `attend`.
  """
  if implementation == 'auto':
    if not _cudnn_obstacle(q):
      return 'cudnn'
    is_long = min(q.shape[1], k.shape[1]) >= _LONG
    return 'splash' if is_long and not _splash_obstacle(q) else 'xla'
  obstacle = ''
  if implementation == 'cudnn':
    obstacle = _cudnn_obstacle(q)
  elif implementation == 'splash':
    obstacle = _splash_obstacle(q)
  if obstacle:
    raise errors.ConfigError(
      f'attention={implementation} for {q.shape[1]} queries and {k.shape[1]} '
      f'keys of heads of {q.shape[-1]} in {q.dtype}: {obstacle}; wanted auto '
      'or xla'
    )
  return implementation


def _attend_in_pairs(
  q: Float[Array, 'b k h d'],
  k: Float[Array, 'b m h d'],
  v: Float[Array, 'b m h d'],
  mask: Bool[Array, 'k m'] | None,
  implementation: Literal['xla', 'cudnn'],
) -> Float[Array, 'b k h d']:
  """Attends in sequences that are padded to even lengths.

  cuDNN has no gradient for others: 65 tokens become 66. What is padded is seen
  by nobody, and cut off.
  """
  queries, keys = q.shape[1], k.shape[1]
  ends, key_ends = None, None
  if (queries % 2 or keys % 2) and mask is None:
    # Cheaper than a mask, of which cuDNN would read every element.
    ends = jnp.full(len(q), queries, jnp.int32)
    key_ends = jnp.full(len(k), keys, jnp.int32)
  elif mask is not None:
    mask = _pad(_pad(mask, 2, axis=0), 2)
  out = jax.nn.dot_product_attention(
    _pad(q, 2),
    _pad(k, 2),
    _pad(v, 2),
    mask=None if mask is None else mask[None, None],
    query_seq_lengths=ends,
    key_value_seq_lengths=key_ends,
    implementation=implementation,
  )
  return out[:, :queries]


def _pad(
  x: Shaped[Array, '...'], multiple: int, axis: int = 1
) -> Shaped[Array, '...']:
  """Appends zeros until the length of an axis is a multiple of `multiple`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, widths)


# Rows and columns of a TPU's matrix unit. Kernels see multiples of it.
_TILE = 128
# The longest side of a block of attention weights, which is in a core's memory.
_MOST_TILES = 4
# Shorter sequences are mostly padding in tiles, and XLA keeps their weights in
# a core's memory anyway.
_LONG = 256
# Name under which rematerialisation finds flash attention's results on TPUs.
KEPT = 'attention'
# Name of its scope: it says how many queries and keys there are in the tiles.
TILED = 'attention_{}x{}'


def _attend_in_tiles(
  q: Float[Array, 'b k h d'],
  k: Float[Array, 'b m h d'],
  v: Float[Array, 'b m h d'],
  *,
  interpret: bool = False,
) -> Float[Array, 'b k h d']:
  """Computes flash attention on a TPU, as `attend` without a mask.

  The kernel takes lengths of whole tiles. What is padded is seen by no query of
  an image, and cut off.

  Args:
    q: queries.
    k: keys.
    v: values.
    interpret: compute the kernel's steps one by one, on any machine.
  """
  # Imported where it is used: it brings the compiler of kernels.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
  # It scales nothing itself. Scaled in float32: rounded to 16 bits, the factor
  # would change all logits alike.
  scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
  padded = [_pad(x, _TILE) for x in (scaled, k, v)]
  length, key_length = padded[0].shape[1], padded[1].shape[1]
  # Padded queries see padded keys: a row that sees nothing has no softmax.
  visible = np.ones((length, key_length), bool)
  visible[:queries, keys:] = False
  block, key_block = _block(length), _block(key_length)
  kernel = splash.make_splash_mha(
    np.broadcast_to(visible, (heads, length, key_length)),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=splash.BlockSizes(
      block_q=block,
      block_kv=key_block,
      block_kv_compute=key_block,
      block_q_dkv=block,
      block_kv_dkv=key_block,
      block_kv_dkv_compute=key_block,
      # Logits are computed again once, not once for each gradient.
      use_fused_bwd_kernel=True,
    ),
    residual_checkpoint_name=KEPT,
    interpret=interpret,
  )
  with jax.named_scope(TILED.format(queries, keys)):
    # It has heads before positions.
    out = jax.vmap(kernel)(*(jnp.moveaxis(x, 2, 1) for x in padded))
  return jnp.moveaxis(out, 1, 2)[:, :queries]


def _block(length: int) -> int:
  """The largest side of a block that divides a length of whole tiles."""
  sides = range(_TILE, _MOST_TILES * _TILE + 1, _TILE)
  return max(side for side in sides if length % side == 0)


def _splash_obstacle(q: Float[Array, 'b k h d']) -> str:
  """Says why a TPU's flash attention cannot compute this; '' if it can."""
  if placement.platform() != 'tpu':
    return 'this needs a TPU'
  # Its products round wider numbers to 16 bits.
  if q.dtype.itemsize != 2:
    return 'it takes 16 bits'
  # Wider ones leave no room in a core's memory for blocks of this size.
  return '' if q.shape[-1] <= _TILE else f'it takes heads up to {_TILE}'


def _cudnn_obstacle(q: Float[Array, 'b k h d']) -> str:
  """Says why cuDNN's flash attention cannot compute this; '' if it can."""
  device = jax.devices()[0]
  known = device.platform == placement.platform() == 'gpu'
  if not known or 'NVIDIA' not in device.device_kind:
    return 'this needs an NVIDIA GPU'
  # Ampere, 8.0, is the first that it knows.
  if float(device.compute_capability) < 8:
    return f'{device.device_kind} is older than Ampere'
  if q.dtype.itemsize != 2:
    return 'it takes 16 bits'
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return 'it takes heads of a multiple of 8, up to 128'
  return ''


# Learned norms over the width of one head, shared by all heads. The epsilon of
# 'layer' is torch's default, under which released checkpoints were trained.
HEAD_NORMS: dict[str, Callable[..., nn.Module]] = {
  'layer': functools.partial(nn.LayerNorm, epsilon=1e-5),
  'rms': functools.partial(nn.RMSNorm, epsilon=LAYER_NORM_EPSILON),
}


def rotate(
  x: Float[Array, 'b k h d'], angles: Float[Array, 'k f']
) -> Float[Array, 'b k h d']:
  """Rotates each pair of neighbouring features by one angle (RoPE).

  d = 2 f. The product of a rotated query and key then depends on the difference
  of their positions alone. Su et al. (2021).
  """
  # In float32: in bfloat16 the cosine of a small angle rounds to 1.
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  cos, sin = (
    f(angles.astype(jnp.float32))[None, :, None] for f in (jnp.cos, jnp.sin)
  )
  first, second = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.reshape(x.shape).astype(x.dtype)
