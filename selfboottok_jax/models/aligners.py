"""Aligners, which predict local tokens from global ones.

There are two: a token-wise MLP (1D) and a causal transformer (2D).
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.models import layers, transformer


class Projector(nn.Module):
  """Maps each token to `features` channels by a three-layer MLP with SiLU.

  It is the local 1D aligner of Eq. (8), and the head that carries tokens to a
  teacher's width in Eq. (6) and (7).

  Attributes:
    features: width of the output (f), which is float32.
    width: of the two hidden layers.
    dtype: type of the hidden layers; parameters are float32.
  """

  features: int
  width: int = 1024
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, z: Float[Array, 'b k e']) -> Float[Array, 'b k f']:
    x = nn.silu(layers.dense(self.width, self.dtype, name='layer0')(z))
    x = nn.silu(layers.dense(self.width, self.dtype, name='layer1')(x))
    # Quantisers and losses read the result, and both need more than bfloat16.
    return layers.dense(self.features, 'float32', name='layer2')(x)


class Local2D(nn.Module):
  """Predicts local tokens at queries behind a prefix of global tokens, Eq. (9).

  The sequence is [global tokens, learned queries]. Global tokens are visible to
  all positions. It is one parallel pass: no position has a target that could
  be fed back, so nothing is decoded step by step.

  Attributes:
    width: of the transformer.
    depth: number of blocks.
    heads: attention heads, a divisor of `width`.
    causal: queries see only earlier queries (Table 3, "C"), instead of all.
    attention: implementation, see `layers.Attention`.
    remat: what the backward pass computes again, see `transformer.REMATS`.
    unroll: blocks per iteration of the compiled loop, see `transformer.Stack`.
    residual_dtype: type in which blocks add up their results: 'float32', or ''
      for `dtype`.
    dtype: of the blocks' computation; parameters and output are float32.
  """

  width: int
  depth: int
  heads: int
  causal: bool = True
  attention: str = 'auto'
  remat: str | bool = 'none'
  unroll: int = 0
  residual_dtype: str = ''
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, z: Float[Array, 'b k e']) -> Float[Array, 'b k e']:
    b, k, e = z.shape
    stream = self.residual_dtype or self.dtype
    x = layers.dense(self.width, self.dtype, name='embed')(z).astype(stream)
    positions = layers.sincos_1d(k, self.width)
    x = x + layers.position_table(self, 'prefix_positions', positions).astype(
      stream
    )
    # Prefix and queries start with the same table, so query i begins at the
    # position of global token i; each then learns a table of its own.
    queries = self.param(
      'queries', nn.initializers.normal(0.02), (1, k, self.width)
    ) + layers.position_table(self, 'query_positions', positions)
    queries = jnp.broadcast_to(queries.astype(stream), x.shape)
    x = jnp.concatenate([x, queries], axis=1)
    mask = transformer.prefix_causal_mask(k, k, causal=self.causal)
    block = functools.partial(
      transformer.Block,
      self.heads,
      attention=self.attention,
      dtype=self.dtype,
    )
    x = transformer.Stack(
      block, self.depth, self.remat, self.unroll, self.dtype, name='blocks'
    )(x, mask)
    # The prefix has served its purpose; only the queries are read.
    x = layers.layer_norm(self.dtype, name='norm')(x[:, k:])
    return layers.dense(e, 'float32', name='to_code')(x)
