"""Small trained heads that judge what a frozen DINO transformer sees.

The design is StyleGAN-T's (Sauer et al., 2023): the frozen trunk, which is
`pretrained.dino`, knows images already, so that the heads learn fast and can
be small.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import errors
from selfboottok_jax.models import normalization

SLOPE = 0.2
# Uniform within 1 / sqrt(inputs). Spectral norm hides the size from the
# function, not from Adam, whose steps are of one size for all weights.
_INITIALISER = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')


class SpectralConv(nn.Module):
  """A convolution along circular positions, its kernel of unit spectral norm.

  Attributes:
    features: channels of the result.
    size: positions under the kernel, an odd number.
    dtype: of the convolution; parameters are float32.
  """

  features: int
  size: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], *, train: bool = False
  ) -> Float[Array, 'b n e']:
    shape = (self.size, x.shape[-1], self.features)
    kernel = self.param('kernel', _INITIALISER, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    kernel = normalization.SpectralNorm(name='spectral')(kernel, train=train)
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    around = self.size // 2
    x = jnp.pad(x, ((0, 0), (around, around), (0, 0)), mode='wrap')
    x = jax.lax.conv_general_dilated(
      x, kernel, (1,), 'VALID', dimension_numbers=('NWC', 'WIO', 'NWC')
    )
    return x + bias[None, None]


class Layer(nn.Module):
  """Convolution to as many channels, batch norm, leaky ReLU."""

  size: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], *, train: bool = False
  ) -> Float[Array, 'b n d']:
    conv = SpectralConv(x.shape[-1], self.size, self.dtype, name='conv')
    norm = normalization.BatchNorm(dtype=self.dtype, name='norm')
    return nn.leaky_relu(norm(conv(x, train=train), train=train), SLOPE)


class Head(nn.Module):
  """Judges each position, having looked at its neighbours in raster order."""

  kernel: int = 9
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], *, train: bool = False
  ) -> Float[Array, 'b n']:
    x = Layer(1, self.dtype, name='embed')(x, train=train)
    around = Layer(self.kernel, self.dtype, name='around')(x, train=train)
    x = (x + around) * math.sqrt(0.5)
    # Losses take differences of logits: bfloat16 would leave two digits.
    return SpectralConv(1, name='logit')(x, train=train)[..., 0]


class DinoDiscriminator(nn.Module):
  """A head for each depth of the trunk, a logit for each of its patches.

  Attributes:
    kernel: positions that a head's second convolution sees, an odd number.
    dtype: of the convolutions; parameters, statistics and logits are float32.
  """

  kernel: int = 9
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, activations: Sequence[Float[Array, 'b n d']], *, train: bool = False
  ) -> Float[Array, 'b m']:
    """Logits, high for real and low for fake, one head after the other.

    Args:
      activations: of the trunk, from its input up.
      train: normalise with the batch's own statistics, and update what
        `normalization.NORMS` remembers.

    Raises:
      ConfigError: an even kernel.
    """
    if self.kernel % 2 == 0:
      raise errors.ConfigError(
        f'discriminator.dino.kernel={self.kernel}; wanted an odd number, with '
        'a position in its middle'
      )
    logits = [
      Head(self.kernel, self.dtype, name=f'head_{i}')(x, train=train)
      for i, x in enumerate(activations)
    ]
    return jnp.concatenate(logits, axis=1)
