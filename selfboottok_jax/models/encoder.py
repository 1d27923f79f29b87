"""Image to global tokens: a ViT read out at learned latent queries."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.models import layers, transformer


class Encoder(nn.Module):
  """[cls | patches] ++ [latent queries] through one ViT; the queries are read.

  Input is [-1, 1]; output z_G is [b, num_tokens, token_dim] in float32. The
  learned positions of the patches start at the 2D sin-cos table, which a short
  training cannot discover.
  """

  patch_size: int
  num_tokens: int
  token_dim: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.0
  attention: str = 'xla'
  remat: bool = False
  unroll: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, images: Float[Array, 'b h w 3']) -> Float[Array, 'b k e']:
    b = images.shape[0]
    side = images.shape[1] // self.patch_size
    x = layers.patchify(images.astype(self.dtype), self.patch_size)
    x = layers.dense(self.width, self.dtype, name='patch_embed')(x)
    x = x + layers.position_table(
      self, 'patch_positions', layers.sincos_2d(side, self.width)
    ).astype(self.dtype)
    normal = nn.initializers.normal(0.02)
    cls = self.param('cls', normal, (1, 1, self.width))
    # Small beside what attention writes over them: large fixed tables make the
    # codes of all images alike, and a short training does not get past that.
    queries = self.param(
      'latent_queries', normal, (1, self.num_tokens, self.width)
    )
    x = jnp.concatenate(
      [
        jnp.broadcast_to(cls.astype(self.dtype), (b, 1, self.width)),
        x,
        jnp.broadcast_to(
          queries.astype(self.dtype), (b, self.num_tokens, self.width)
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
      block, self.depth, self.remat, self.unroll, name='blocks'
    )(x)
    x = layers.layer_norm(self.dtype, name='norm')(x[:, -self.num_tokens :])
    # The codes live in float32: their softmax is taken at temperature 0.07.
    return layers.dense(self.token_dim, 'float32', name='to_code')(x)
