"""SiT: the transformer that predicts the velocity of noisy tokens."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from selfboottok_jax.models import layers, transformer

_TIME_FEATURES = 256


class Modulated(nn.Module):
  """A block whose norms are shifted, scaled and gated by a condition.

  The modulation starts at zero (adaLN-zero), so the block starts as identity.
  """

  heads: int
  mlp_ratio: float = 4.0
  qk_norm: bool = False
  attention: str = 'xla'
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b k d'], condition: Float[Array, 'b d']
  ) -> Float[Array, 'b k d']:
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(
      condition, 6, self.dtype
    )
    attend = layers.Attention(
      self.heads, self.qk_norm, self.attention, self.dtype, name='attn'
    )
    mlp = layers.Mlp(self.mlp_ratio, 'tanh', self.dtype, name='mlp')
    h = layers.modulate(_plain_norm(self.dtype)(x), shift1, scale1)
    x = x + gate1[:, None] * attend(h)
    h = layers.modulate(_plain_norm(self.dtype)(x), shift2, scale2)
    return x + gate2[:, None] * mlp(h)


class SiT(nn.Module):
  """Velocity of noisy tokens at time t (0 data, 1 noise) for class labels.

  Labels are in [0, num_classes]; `num_classes` itself is the null label.
  The last layer starts at zero, hence so does the velocity.

  Attributes:
    num_tokens: k; positions are a fixed sin-cos table.
    token_dim: e.
    num_classes: classes without the null label.
    width: d; 384, 768, 1024 and 1152 in the S, B, L and XL of the paper.
    depth: number of blocks.
    heads: attention heads, a divisor of `width`.
    mlp_ratio: hidden width of the MLPs over d.
    qk_norm: LayerNorm of queries and keys, per head.
    label_dropout: rate at which training replaces labels by the null label.
    dtype: of the blocks' computation; parameters, time features and the
      velocity are float32.
    remat: recompute blocks in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    attention: implementation, see `layers.Attention`.
  """

  num_tokens: int
  token_dim: int
  num_classes: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  qk_norm: bool = False
  label_dropout: float = 0.1
  dtype: str = 'float32'
  remat: bool = False
  unroll: int = 1
  attention: str = 'xla'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b k e'],
    t: Float[Array, ' b'],
    labels: Int[Array, ' b'],
    *,
    train: bool = False,
  ) -> Float[Array, 'b k e']:
    """Returns the velocity; `train` drops labels by the rng 'dropout'."""
    if train:
      labels = self._drop(labels)
    condition = self._embed_time(t) + nn.Embed(
      self.num_classes + 1,
      self.width,
      embedding_init=nn.initializers.normal(0.02),
      dtype=self.dtype,
      name='label_table',
    )(labels)
    positions = layers.sincos_1d(self.num_tokens, self.width)[None]
    h = layers.dense(self.width, self.dtype, name='token_embed')(x)
    h = h + jnp.asarray(positions, h.dtype)
    block = functools.partial(
      Modulated,
      self.heads,
      self.mlp_ratio,
      self.qk_norm,
      self.attention,
      self.dtype,
    )
    h = transformer.Stack(
      block, self.depth, self.remat, self.unroll, name='blocks'
    )(h, condition)
    shift, scale = _modulation(condition, 2, self.dtype)
    h = layers.modulate(_plain_norm(self.dtype)(h), shift, scale)
    v = _zero_dense(self.token_dim, 'float32', name='to_velocity')(h)
    return v.astype(jnp.float32)

  def _drop(self, labels: Int[Array, ' b']) -> Int[Array, ' b']:
    key = self.make_rng('dropout')
    dropped = jax.random.bernoulli(key, self.label_dropout, labels.shape)
    return jnp.where(dropped, self.num_classes, labels)

  def _embed_time(self, t: Float[Array, ' b']) -> Float[Array, 'b d']:
    normal = nn.initializers.normal(0.02)
    # 16 bits cannot tell neighbouring times of a 250-step grid apart, neither
    # in the features nor in what is made of them.
    features = layers.timestep_features(t.astype(jnp.float32), _TIME_FEATURES)
    dense = functools.partial(
      nn.Dense, self.width, kernel_init=normal, dtype=jnp.float32
    )
    return dense(name='time1')(nn.silu(dense(name='time0')(features)))


def _zero_dense(features: int, dtype: str, name: str) -> nn.Dense:
  zeros = nn.initializers.zeros_init()
  return nn.Dense(features, dtype=dtype, kernel_init=zeros, name=name)


def _plain_norm(dtype: str) -> nn.LayerNorm:
  """LayerNorm without parameters: the modulation has them."""
  return nn.LayerNorm(
    epsilon=layers.LAYER_NORM_EPSILON,
    use_bias=False,
    use_scale=False,
    dtype=dtype,
  )


def _modulation(condition, parts: int, dtype: str):
  """`parts` shifts, scales and gates [b, d] read from the condition."""
  width = condition.shape[-1]
  out = _zero_dense(parts * width, dtype, 'modulation')(nn.silu(condition))
  return jnp.split(out, parts, axis=-1)
