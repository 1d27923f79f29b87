"""Local tokens from global ones: the 1D MLP and the 2D causal transformer."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.models import layers, transformer


class Projector(nn.Module):
  """Token-wise Linear-SiLU-Linear-SiLU-Linear to `features` channels.

  It is the local 1D aligner of Eq. (8), and the head that carries tokens to a
  teacher's width in Eq. (6) and (7). Output is float32.
  """

  features: int
  width: int = 1024
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, z: Float[Array, 'b k e']) -> Float[Array, 'b k f']:
    x = nn.silu(layers.dense(self.width, self.dtype, name='layer0')(z))
    x = nn.silu(layers.dense(self.width, self.dtype, name='layer1')(x))
    return layers.dense(self.features, 'float32', name='layer2')(x)


class Local2D(nn.Module):
  """Eq. (9): local tokens read at queries behind a prefix of global tokens.

  One parallel pass: the sequence is [global tokens, fully visible; learned
  queries], the mask is prefix-causal (`causal`, Table 3's "C") or lets the
  queries see each other both ways. No per-position target exists that could be
  fed back, so nothing is decoded step by step.
  """

  width: int
  depth: int
  heads: int
  causal: bool = True
  attention: str = 'xla'
  remat: bool = False
  unroll: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, z: Float[Array, 'b k e']) -> Float[Array, 'b k e']:
    b, k, e = z.shape
    x = layers.dense(self.width, self.dtype, name='embed')(z)
    positions = layers.sincos_1d(k, self.width)
    x = x + layers.position_table(self, 'prefix_positions', positions).astype(
      self.dtype
    )
    queries = self.param(
      'queries', nn.initializers.normal(0.02), (1, k, self.width)
    ) + layers.position_table(self, 'query_positions', positions)
    queries = jnp.broadcast_to(queries.astype(self.dtype), x.shape)
    x = jnp.concatenate([x, queries], axis=1)
    mask = transformer.prefix_causal_mask(k, k, causal=self.causal)
    block = functools.partial(
      transformer.Block,
      self.heads,
      attention=self.attention,
      dtype=self.dtype,
    )
    x = transformer.Stack(
      block, self.depth, self.remat, self.unroll, name='blocks'
    )(x, mask)
    x = layers.layer_norm(self.dtype, name='norm')(x[:, k:])
    return layers.dense(e, 'float32', name='to_code')(x)
