"""The convolutional autoencoder of latent diffusion: VA-VAE and SD-VAE."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_EPSILON = 1e-6
# The reference's bounds of the posterior's log variance.
_LOG_VARIANCE = (-30.0, 20.0)


class Autoencoder(nn.Module):
  """Images in [-1, 1] to a Gaussian posterior over latents, and back.

  Attributes:
    channels: width of each level, finest first; each level but the last halves
      rows and columns. VA-VAE f16: (128, 128, 256, 256, 512); SD-VAE f8:
      (128, 256, 512, 512).
    blocks: residual blocks of a level of the encoder; the decoder has one more.
    latent_dim: channels of a latent.
    stem: width before the first level; 0 is that of the level.
    attend_last: whether the coarsest level attends after each block (VA-VAE).
    groups: of the group norms.
    dtype: of the computation; means, variances and images are float32.
  """

  channels: tuple[int, ...]
  blocks: int = 2
  latent_dim: int = 32
  stem: int = 0
  attend_last: bool = True
  groups: int = 32
  dtype: str = 'float32'

  def setup(self):
    parts = _Parts(self.groups, self.dtype)
    fields = self.channels, self.blocks, self.attend_last, parts
    stem = self.stem or self.channels[0]
    self.encoder = Encoder(2 * self.latent_dim, stem, *fields)
    self.decoder = Decoder(*fields)
    self.quant = nn.Conv(2 * self.latent_dim, (1, 1))
    self.post_quant = nn.Conv(self.latent_dim, (1, 1))

  def __call__(
    self, images: Float[Array, 'b h w 3']
  ) -> Float[Array, 'b h w 3']:
    """Decodes the posterior mean."""
    return self.decode(self.encode(images)[0])

  def encode(
    self, images: Float[Array, 'b h w 3']
  ) -> tuple[Float[Array, 'b i j e'], Float[Array, 'b i j e']]:
    """Mean and log variance of the posterior."""
    # Outside the network a mean needs more digits than 16 bits hold.
    moments = self.quant(self.encoder(images).astype(jnp.float32))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCE)

  def decode(self, latents: Float[Array, 'b i j e']) -> Float[Array, 'b h w 3']:
    """Images around [-1, 1]."""
    images = self.decoder(self.post_quant(latents))
    return images.astype(jnp.float32)

  @property
  def stride(self) -> int:
    """Pixels of an image to one latent, along each side."""
    return 2 ** (len(self.channels) - 1)


@dataclasses.dataclass(frozen=True)
class _Parts:
  """Makes the layers, all of one dtype."""

  groups: int
  dtype: str

  def conv(self, features: int, size: int, name: str, **options: Any):
    return nn.Conv(
      features, (size, size), dtype=self.dtype, name=name, **options
    )

  def dense(self, features: int, name: str):
    return nn.Dense(features, dtype=self.dtype, name=name)

  def norm(self, name: str):
    return nn.GroupNorm(
      self.groups, epsilon=_EPSILON, dtype=self.dtype, name=name
    )


class Encoder(nn.Module):
  """Residual blocks and halvings, then a middle with attention."""

  features: int
  stem: int
  channels: tuple[int, ...]
  blocks: int
  attend_last: bool
  parts: _Parts

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b i j f']:
    last = len(self.channels) - 1
    x = self.parts.conv(self.stem, 3, 'conv_in')(x)
    for level, width in enumerate(self.channels):
      attend = self.attend_last and level == last
      x = _level(x, level, width, self.blocks, self.parts, attend)
      if level < last:
        # One row and one column of zeros, below and to the right.
        x = self.parts.conv(
          width,
          3,
          f'level{level}_down',
          strides=2,
          padding=((0, 1), (0, 1)),
        )(x)
    x = _middle(x, self.parts)
    x = nn.silu(self.parts.norm('norm')(x))
    return self.parts.conv(self.features, 3, 'conv_out')(x)


class Decoder(nn.Module):
  """The encoder's mirror, with one more block a level and doublings."""

  channels: tuple[int, ...]
  blocks: int
  attend_last: bool
  parts: _Parts

  @nn.compact
  def __call__(self, x: Float[Array, 'b i j e']) -> Float[Array, 'b h w 3']:
    last = len(self.channels) - 1
    x = self.parts.conv(self.channels[-1], 3, 'conv_in')(x)
    x = _middle(x, self.parts)
    for level in range(last, -1, -1):
      width = self.channels[level]
      attend = self.attend_last and level == last
      x = _level(x, level, width, self.blocks + 1, self.parts, attend)
      if level:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = self.parts.conv(width, 3, f'level{level}_up')(x)
    x = nn.silu(self.parts.norm('norm')(x))
    return self.parts.conv(3, 3, 'conv_out')(x)


class Residual(nn.Module):
  """Two convolutions, each behind a group norm and a SiLU."""

  features: int
  parts: _Parts

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w f']:
    h = nn.silu(self.parts.norm('norm1')(x))
    h = self.parts.conv(self.features, 3, 'conv1')(h)
    h = nn.silu(self.parts.norm('norm2')(h))
    h = self.parts.conv(self.features, 3, 'conv2')(h)
    if x.shape[-1] != self.features:
      x = self.parts.conv(self.features, 1, 'shortcut')(x)
    return x + h


class SelfAttention(nn.Module):
  """One head over all positions."""

  parts: _Parts

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
    b, rows, columns, c = x.shape
    h = self.parts.norm('norm')(x).reshape(b, rows * columns, 1, c)
    q, k, v = (self.parts.dense(c, name)(h) for name in ('q', 'k', 'v'))
    mixed = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    return x + self.parts.dense(c, 'out')(mixed)


def _level(x, level, width, count, parts, attend):
  """`count` residual blocks, each with attention behind it where wanted."""
  for index in range(count):
    x = Residual(width, parts, name=f'level{level}_block{index}')(x)
    if attend:
      x = SelfAttention(parts, name=f'level{level}_attn{index}')(x)
  return x


def _middle(x, parts):
  width = x.shape[-1]
  x = Residual(width, parts, name='mid_block0')(x)
  x = SelfAttention(parts, name='mid_attn')(x)
  return Residual(width, parts, name='mid_block1')(x)
