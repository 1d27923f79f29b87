"""A convolutional discriminator of the StyleGAN family, from scratch.

What it keeps of that family: residual blocks that halve the grid, a blur before
every stride, leaky ReLU, the standard deviation of a minibatch as a feature, no
batch norm. What it leaves: equalised learning rates. Those are made for Adam at
2e-3; here the discriminator shares the tokenizer's 1e-4, at which weights of
unit size would barely move, so weights are plain He normals.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import errors

SLOPE = 0.2
BLUR = (0.125, 0.375, 0.375, 0.125)

# He's variance for a leaky ReLU: activations keep their size with depth.
_INITIALISER = nn.initializers.variance_scaling(
  2 / (1 + SLOPE**2), 'fan_in', 'normal'
)


def blur(
  x: Float[Array, 'b h w c'], *, padding: int, stride: int = 1
) -> Float[Array, 'b p q c']:
  """Low-pass filters with [1, 3, 3, 1] / 8 along both axes.

  Zero padding on all sides; each side of the result has
  floor((side + 2 padding - 4) / stride) + 1 pixels. A stride straight after it
  no longer folds high frequencies into low ones.
  """
  # Shifted sums: a grouped convolution of one channel each is slow on CPU.
  for axis in (1, 2):
    pad = [(0, 0)] * 4
    pad[axis] = (padding, padding)
    padded = jnp.pad(x, pad)
    size = padded.shape[axis] - len(BLUR) + 1
    x = sum(
      weight
      * jax.lax.slice_in_dim(padded, shift, shift + size, stride, axis=axis)
      for shift, weight in enumerate(BLUR)
    )
  return x


def minibatch_deviation(
  x: Float[Array, 'b h w c'], group: int
) -> Float[Array, 'b h w 1']:
  """How much the images of a group differ: one number, as an extra channel.

  Groups are neighbours in the batch, so that they stay on one device, and have
  gcd(b, group) members. Give real and fake images in separate batches, or in
  halves of a multiple of `group`, lest a group mix them.
  """
  b, h, w, c = x.shape
  members = math.gcd(b, group)
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  variance = jnp.var(wide.reshape(b // members, members, h, w, c), axis=1)
  # The root has no gradient at 0, where groups of one always are.
  deviation = jnp.mean(jnp.sqrt(variance + 1e-8), axis=(1, 2, 3))
  channel = jnp.repeat(deviation, members)[:, None, None, None]
  return jnp.broadcast_to(channel, (b, h, w, 1)).astype(x.dtype)


class DownBlock(nn.Module):
  """Halves the grid: two 3x3 convolutions beside a 1x1 one, over sqrt 2."""

  features: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q d']:
    skip = blur(x, padding=1, stride=2)
    skip = _conv(self.features, 1, self.dtype, name='skip', use_bias=False)(
      skip
    )
    x = _conv(x.shape[-1], 3, self.dtype, name='first', padding=1)(x)
    x = blur(nn.leaky_relu(x, SLOPE), padding=2)
    x = _conv(self.features, 3, self.dtype, name='second', stride=2)(x)
    return (nn.leaky_relu(x, SLOPE) + skip) * math.sqrt(0.5)


class StyleGanDiscriminator(nn.Module):
  """One logit per image: the paper's "StyleGAN-like" discriminator.

  Attributes:
    width: channels at full resolution; doubled by every block. 64 for images
      of 256 pixels, 16 for 32 pixels on a CPU.
    max_width: bound of the channels.
    min_resolution: halve while the shorter side stays at least this long.
    group: size of the minibatch groups; see `minibatch_deviation`.
    dtype: of the convolutions; parameters and logits are float32.
  """

  width: int = 64
  max_width: int = 512
  min_resolution: int = 4
  group: int = 4
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, images: Float[Array, 'b h w 3']) -> Float[Array, ' b']:
    """Judges images in [-1, 1]: high for real, low for fake.

    The final layers read the whole last grid, so that parameters belong to one
    image size.

    Raises:
      ConfigError: a side that the blocks cannot halve evenly.
    """
    num_blocks = self._num_blocks(*images.shape[1:3])
    x = _conv(self.width, 1, self.dtype, name='from_rgb')(
      images.astype(self.dtype)
    )
    x = nn.leaky_relu(x, SLOPE)
    for i in range(num_blocks):
      features = min(self.width * 2 ** (i + 1), self.max_width)
      x = DownBlock(features, self.dtype, name=f'block_{i}')(x)
    x = jnp.concatenate([x, minibatch_deviation(x, self.group)], axis=-1)
    x = _conv(x.shape[-1] - 1, 3, self.dtype, name='mix', padding=1)(x)
    x = nn.leaky_relu(x, SLOPE).reshape(x.shape[0], -1)
    x = nn.Dense(
      min(self.width * 2**num_blocks, self.max_width),
      dtype=self.dtype,
      kernel_init=_INITIALISER,
      name='hidden',
    )(x)
    # Losses take differences of logits: bfloat16 would leave two digits.
    x = nn.leaky_relu(x, SLOPE).astype(jnp.float32)
    return nn.Dense(1, name='logit')(x)[:, 0]

  def _num_blocks(self, height, width):
    shorter = min(height, width)
    if shorter < self.min_resolution:
      raise errors.ConfigError(
        f'the discriminator got images of {height}x{width} pixels and needs '
        f'at least {self.min_resolution}; lower its min_resolution'
      )
    num_blocks = int(math.log2(shorter / self.min_resolution))
    if height % 2**num_blocks or width % 2**num_blocks:
      raise errors.ConfigError(
        f'the discriminator halves images {num_blocks} times and got '
        f'{height}x{width} pixels; use sides that are multiples of '
        f'{2**num_blocks} or raise its min_resolution'
      )
    return num_blocks


def _conv(features, size, dtype, *, name, padding=0, stride=1, use_bias=True):
  return nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=((padding, padding), (padding, padding)),
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=_INITIALISER,
    name=name,
  )
