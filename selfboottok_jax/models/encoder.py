"""The encoder from images to global tokens, a ViT with latent queries."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.models import layers, transformer


class Encoder(nn.Module):
  """Encodes images in [-1, 1] to global tokens z_G with a ViT.

  The sequence is [cls, patches, latent queries]; tokens are read at the
  queries, k = num_tokens of e = token_dim numbers each, in float32.

  Attributes:
    patch_size: side of a patch in pixels, a divisor of the image's sides.
    num_tokens: tokens per image.
    token_dim: numbers per token.
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
    dtype: of the blocks' computation; parameters and tokens are float32.
  """

  patch_size: int
  num_tokens: int
  token_dim: int
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
  def __call__(self, images: Float[Array, 'b h w 3']) -> Float[Array, 'b k e']:
    b = images.shape[0]
    rows, columns = (side // self.patch_size for side in images.shape[1:3])
    x = layers.patchify(images.astype(self.dtype), self.patch_size)
    stream = self.residual_dtype or self.dtype
    x = layers.dense(self.width, self.dtype, name='patch_embed')(x)
    # Learned, but from the 2D sin-cos table: a short training cannot discover
    # the geometry of the grid.
    x = x.astype(stream) + layers.position_table(
      self, 'patch_positions', layers.sincos_2d((rows, columns), self.width)
    ).astype(stream)
    normal = nn.initializers.normal(0.02)
    cls = self.param('cls', normal, (1, 1, self.width))
    # Small, so that what attention adds to them dominates. Large fixed tables
    # make the codes of all images alike, which a short training cannot undo.
    queries = self.param(
      'latent_queries', normal, (1, self.num_tokens, self.width)
    )
    x = jnp.concatenate(
      [
        jnp.broadcast_to(cls.astype(stream), (b, 1, self.width)),
        x,
        jnp.broadcast_to(
          queries.astype(stream), (b, self.num_tokens, self.width)
        ),
      ],
      axis=1,
    )
    block = functools.partial(
      transformer.Block,
      self.heads,
      self.mlp_ratio,
      self.layer_scale,
      self.attention,
      self.dtype,
    )
    x = transformer.Stack(
      block, self.depth, self.remat, self.unroll, self.dtype, name='blocks'
    )(x)
    x = layers.layer_norm(self.dtype, name='norm')(x[:, -self.num_tokens :])
    # The codes are float32: their softmax is taken at temperature 0.07.
    return layers.dense(self.token_dim, 'float32', name='to_code')(x)
