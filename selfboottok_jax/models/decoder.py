"""Fusion of the token groups, and the decoder from tokens to pixels."""

import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import sizes
from selfboottok_jax.models import layers, transformer

FUSIONS = ('residual', 'concat')


class Fusion(nn.Module):
  """Fuses token groups by a weighted sum or by concatenation, Eq. (11).

  The weights of the sum are learned scalars that add up to 1. They start at
  (1, 0, ...), so that a fresh model decodes its global tokens alone.

  Attributes:
    mode: 'residual' for the sum (m = k), 'concat' for m = k * groups tokens.
  """

  mode: str = 'residual'

  @nn.compact
  def __call__(
    self, groups: Sequence[Float[Array, 'b k e']]
  ) -> Float[Array, 'b m e']:
    if self.mode == 'concat':
      return jnp.concatenate(list(groups), axis=1)
    if len(groups) == 1:
      return groups[0]
    # The last weight is what is left to 1, so it needs no parameter.
    start = [1.0] + [0.0] * (len(groups) - 2)
    weights = self.param('weights', lambda _: jnp.asarray(start))
    weights = jnp.append(weights, 1 - jnp.sum(weights))
    stacked = jnp.stack(list(groups))
    exact = layers.precision(stacked.dtype)
    return jnp.einsum('g,gbke->bke', weights, stacked, precision=exact)


class DecoderBlock(nn.Module):
  """Applies gated cross-attention to each context, then a plain ViT block.

  Gates are learned scalars that start at 0, so that a fresh block is the ViT
  block alone. `keep` has a 0 for each image that must not read a context, and
  a 1 for the others. Fields are those of `transformer.Block`.
  """

  heads: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.0
  attention: str = 'auto'
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b k d'],
    contexts: tuple[Float[Array, 'b _ d'], ...] = (),
    keep: tuple[Float[Array, ' b'], ...] = (),
  ) -> Float[Array, 'b k d']:
    for i, (context, kept) in enumerate(zip(contexts, keep, strict=True)):
      attend = layers.Attention(
        self.heads,
        implementation=self.attention,
        dtype=self.dtype,
        name=f'cross{i}',
      )
      gate = self.param(f'gate{i}', nn.initializers.zeros, ())
      branch = attend(
        layers.layer_norm(self.dtype, name=f'cross_norm{i}')(x), context
      )
      # The product is taken in float32; the cast keeps the stream's type.
      x = x + branch * (gate * kept).astype(self.dtype)[:, None, None]
    return transformer.Block(
      self.heads,
      self.mlp_ratio,
      self.layer_scale,
      self.attention,
      self.dtype,
      name='vit',
    )(x)


class Decoder(nn.Module):
  """Decodes fused tokens to pixels with a ViT, Eq. (10).

  The sequence is [cls, one mask token per patch, fused tokens]; pixels are read
  at the mask tokens. Local groups enter a second time, by gated cross-attention
  in every block, each through its own projection.

  The output is made for [-1, 1], but it is linear and may overshoot.

  Attributes:
    image_size: side of the output, or (height, width); multiples of
      `patch_size`.
    patch_size: side of a patch in pixels.
    width: of the transformer, a multiple of 4.
    depth: number of blocks.
    heads: attention heads, a divisor of `width`.
    mlp_ratio: hidden width of the MLPs over `width`.
    layer_scale: initial gain of residual branches; 0 leaves the gains out.
    attention: implementation, see `layers.Attention`.
    remat: what the backward pass computes again, see `transformer.REMATS`.
    unroll: blocks per iteration of the compiled loop, see `transformer.Stack`.
    residual_dtype: type in which blocks add up their results: 'float32', or ''
      for `dtype`.
    dtype: of the blocks' computation; parameters and pixels are float32.
  """

  image_size: sizes.Size
  patch_size: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.0
  attention: str = 'auto'
  remat: str | bool = 'none'
  unroll: int = 0
  residual_dtype: str = ''
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    fused: Float[Array, 'b m e'],
    contexts: Sequence[Float[Array, 'b _ e']] = (),
    keep: Sequence[Float[Array, ' b']] = (),
  ) -> Float[Array, 'b h w 3']:
    b, m, _ = fused.shape
    stream = self.residual_dtype or self.dtype
    grid = sizes.grid(self.image_size, self.patch_size)
    normal = nn.initializers.normal(0.02)
    # One vector for all patches: their positions alone tell them apart.
    mask_token = self.param('mask_token', normal, (1, 1, self.width))
    patches = mask_token + layers.position_table(
      self, 'patch_positions', layers.sincos_2d(grid, self.width)
    )
    cls = self.param('cls', normal, (1, 1, self.width))
    start = jnp.concatenate([cls, patches], axis=1).astype(stream)
    # Codes lie in the unit ball. Weights of unit variance bring them to the
    # size of the position tables; Xavier's would leave them at a tenth of it,
    # and attention would hardly notice them.
    embed = functools.partial(
      nn.Dense,
      self.width,
      dtype=self.dtype,
      precision=layers.precision(self.dtype),
      kernel_init=nn.initializers.normal(1.0),
    )
    token_positions = self.param('token_positions', normal, (1, m, self.width))
    tokens = embed(name='from_code')(fused).astype(stream)
    tokens = tokens + token_positions.astype(stream)
    # Everything before the codes is the same for all images.
    x = jnp.concatenate(
      [jnp.broadcast_to(start, (b, *start.shape[1:])), tokens], axis=1
    )
    projected = tuple(
      embed(name=f'context{i}')(context) for i, context in enumerate(contexts)
    )
    block = functools.partial(
      DecoderBlock,
      self.heads,
      self.mlp_ratio,
      self.layer_scale,
      self.attention,
      self.dtype,
    )
    x = transformer.Stack(
      block, self.depth, self.remat, self.unroll, self.dtype, name='blocks'
    )(x, projected, tuple(keep))
    # Drop cls and the codes; cross-attention and the blocks have read them.
    x = layers.layer_norm(self.dtype, name='norm')(
      x[:, 1 : 1 + math.prod(grid)]
    )
    # The adaptive weight of the adversarial loss needs the input of the last
    # layer. Sowing costs nothing where no caller collects it.
    self.sow('intermediates', 'features', x)
    pixels = layers.dense(self.patch_size**2 * 3, 'float32', name='to_pixels')(
      x
    )
    return layers.unpatchify(pixels, self.patch_size, grid)
