"""One vision transformer for DINOv2, DINO, I-JEPA and SigLIP2."""

import functools

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.models import layers, transformer


@flax.struct.dataclass
class VitOutput:
  """What a transformer says of a batch of images.

  Attributes:
    patches: after the final norm, in raster order.
    summary: the class token after the final norm, or the pooled token of an
      attention head; None where there is neither.
    hidden: by number of blocks passed, all tokens [b, m, d]: class token,
      registers, patches.
  """

  patches: Float[Array, 'b n d']
  summary: Float[Array, 'b d'] | None
  hidden: dict[int, Float[Array, 'b m d']]


class Vit(nn.Module):
  """A pre-norm vision transformer on images of one size.

  Attributes:
    grid: rows and columns of patches; the position table is of this grid.
    patch_size: p.
    width: d.
    depth: number of blocks.
    heads: attention heads, a divisor of `width`.
    hidden: width of the MLPs.
    cls: whether a class token with a position of its own goes first.
    registers: tokens without a position, behind the class token.
    layer_scale: whether residual branches have gains.
    gelu: 'exact' or 'tanh'.
    pool: whether an attention head with a learned probe makes the summary.
    taps: numbers of blocks after which all tokens are handed out.
    attention: implementation, see `layers.Attention`.
    dtype: of the computation; outputs are float32.
  """

  grid: tuple[int, int]
  patch_size: int
  width: int
  depth: int
  heads: int
  hidden: int
  cls: bool = True
  registers: int = 0
  layer_scale: bool = False
  gelu: str = 'exact'
  pool: bool = False
  taps: tuple[int, ...] = ()
  attention: str = 'xla'
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, images: Float[Array, 'b h w 3']) -> VitOutput:
    """Takes images as the network was trained on them, normalised."""
    x = layers.patchify(images.astype(self.dtype), self.patch_size)
    x = layers.dense(self.width, self.dtype, name='patch_embed')(x)
    count = self.grid[0] * self.grid[1]
    if x.shape[1] != count:
      raise ValueError(
        f'{x.shape[1]} patches of images {images.shape[1:3]}; wanted a grid of '
        f'{self.grid[0]} x {self.grid[1]}'
      )
    x = x + self._tokens('positions', count)
    first = [self._tokens('cls', 1)] if self.cls else []
    if self.registers:
      first.append(self._tokens('registers', self.registers))
    first = [jnp.broadcast_to(t, (len(x), *t.shape[1:])) for t in first]
    x = jnp.concatenate([*first, x], axis=1)
    x, hidden = self._blocks(x)
    x = layers.layer_norm(self.dtype, name='norm')(x).astype(jnp.float32)
    summary = x[:, 0] if self.cls else None
    patches = x[:, -count:]
    if self.pool:
      summary = self._pool(patches)
    return VitOutput(patches, summary, hidden)

  def _tokens(self, name: str, count: int):
    shape = (1, count, self.width)
    normal = nn.initializers.normal(0.02)
    return self.param(name, normal, shape).astype(self.dtype)

  def _blocks(self, x):
    """Segments that end where somebody reads, each scanned."""
    block = functools.partial(
      transformer.Block,
      self.heads,
      self.hidden / self.width,
      float(self.layer_scale),
      self.attention,
      self.dtype,
      self.gelu,
    )
    hidden = {0: x.astype(jnp.float32)} if 0 in self.taps else {}
    for begin, end in transformer.segments(self.depth, self.taps):
      name = transformer.segment_name(begin)
      stack = transformer.Stack(block, end - begin, name=name)
      x = stack(x)
      if end in self.taps:
        hidden[end] = x.astype(jnp.float32)
    return x, hidden

  def _pool(self, patches):
    """A learned probe attends to the patches; then a residual MLP."""
    b = patches.shape[0]
    probe = jnp.broadcast_to(self._tokens('probe', 1), (b, 1, self.width))
    attend = layers.Attention(self.heads, dtype=self.dtype, name='pool_attn')
    pooled = attend(probe, patches.astype(self.dtype))
    h = layers.layer_norm(self.dtype, name='pool_norm')(pooled)
    ratio = self.hidden / self.width
    mlp = layers.Mlp(ratio, self.gelu, self.dtype, name='pool_mlp')
    return (pooled + mlp(h))[:, 0].astype(jnp.float32)
