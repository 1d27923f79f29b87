"""The tokenizer's two discriminators, and the norms that only they use.

Spectral norm and batch norm keep variables in the collection NORMS. A training
forward (`train=True`) updates them, and its caller stores them; they carry no
gradient and are float32 in every computation.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import errors
from selfboottok_jax.models import layers

# Name of the variable collection; pass it as `mutable` where `train` is True.
NORMS = 'norms'
# Slope of every leaky ReLU below zero, as in StyleGAN.
SLOPE = 0.2
# [1, 3, 3, 1] / 8, the low-pass filter of StyleGAN.
BLUR = (0.125, 0.375, 0.375, 0.125)

# torch's default, uniform within 1 / sqrt(inputs). Spectral norm hides a
# kernel's size from the function, but not from Adam, whose steps have the same
# size for all weights: larger kernels would turn more slowly.
_UNIFORM = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
# He's variance for a leaky ReLU: activations keep their size with depth.
_HE_NORMAL = nn.initializers.variance_scaling(
  2 / (1 + SLOPE**2), 'fan_in', 'normal'
)


class SpectralNorm(nn.Module):
  """Divides a kernel by an estimate of its largest singular value.

  The kernel is read as a matrix from all its inputs to its outputs (the last
  axis). Each training forward improves the estimate by one step of the power
  iteration (Miyato et al., 2018) from a random start, so the first estimates
  are too low. The singular vectors `u` (outputs) and `v` (inputs) are constants
  for the gradient.
  """

  @nn.compact
  def __call__(
    self, kernel: Float[Array, '*s o'], *, train: bool = False
  ) -> Float[Array, '*s o']:
    # All axes but the outputs' are inputs, as torch reads a convolution.
    matrix = kernel.reshape(-1, kernel.shape[-1])
    v, u = (
      self.variable(NORMS, name, self._random_unit, size)
      for name, size in zip('vu', matrix.shape, strict=True)
    )
    # Initialisation only creates the variables; it is no training step.
    if train and not self.is_initializing():
      fixed = jax.lax.stop_gradient(matrix)
      v.value = _unit(_product(fixed, u.value))
      u.value = _unit(_product(v.value, fixed))
    # The new vectors, as in torch: sigma = v' W u is differentiated in W alone.
    return kernel / _product(_product(v.value, matrix), u.value)

  def _random_unit(self, size: int) -> Float[Array, ' n']:
    """Draws a vector of length 1 to start the power iteration from."""
    return _unit(jax.random.normal(self.make_rng('params'), (size,)))


class BatchNorm(nn.Module):
  """Normalises each channel over the batch, then applies an affine map.

  Attributes:
    momentum: share of the newest batch in the running statistics, which are
      used outside of training.
    epsilon: added to the variance.
    dtype: type of the result; statistics are float32.
  """

  momentum: float = 0.1
  epsilon: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, '*b d'], *, train: bool = False
  ) -> Float[Array, '*b d']:
    width, axes = x.shape[-1], tuple(range(x.ndim - 1))
    scale = self.param('scale', nn.initializers.ones, (width,))
    bias = self.param('bias', nn.initializers.zeros, (width,))
    mean = self.variable(NORMS, 'mean', jnp.zeros, (width,))
    variance = self.variable(NORMS, 'variance', jnp.ones, (width,))
    # The variance of many bfloat16 values is lost in their rounding.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def along(channels: Float[Array, ' d']) -> Float[Array, '... d']:
      # Explicit axes: JAX may be set to refuse adding arrays of other ranks.
      return jnp.expand_dims(channels, axes)

    if not train:
      centred, spread = x - along(mean.value), variance.value
    else:
      # Statistics of the global batch, however it is sharded: under jit a mean
      # over an axis is over all of it, and XLA adds the sum over devices.
      centre = jnp.mean(x, axis=axes)
      centred = x - along(centre)
      # The biased variance normalises, the unbiased one is remembered (torch).
      spread = jnp.mean(jnp.square(centred), axis=axes)
      if not self.is_initializing():
        count = x.size // width
        self._follow(mean, centre)
        self._follow(variance, spread * (count / max(count - 1, 1)))
    normal = centred * along(jax.lax.rsqrt(spread + self.epsilon) * scale)
    return (normal + along(bias)).astype(self.dtype)

  def _follow(self, running: nn.Variable, new: Float[Array, ' d']) -> None:
    """Moves a running statistic towards the newest batch's."""
    # Running statistics take no part in the gradient.
    new = jax.lax.stop_gradient(new)
    running.value += self.momentum * (new - running.value)


class SpectralConv(nn.Module):
  """A circular 1D convolution whose kernel has unit spectral norm.

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
    kernel = self.param('kernel', _UNIFORM, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    # The norm is taken in float32, before the kernel is cast.
    kernel = SpectralNorm(name='spectral')(kernel, train=train)
    x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
    around = self.size // 2
    # Wrapping keeps the length, and shows no artificial zeros to the kernel.
    x = jnp.pad(x, ((0, 0), (around, around), (0, 0)), mode='wrap')
    x = jax.lax.conv_general_dilated(
      x,
      kernel,
      (1,),
      'VALID',
      dimension_numbers=('NWC', 'WIO', 'NWC'),
      precision=layers.precision(x.dtype),
    )
    return x + bias[None, None]


class Layer(nn.Module):
  """Convolution, batch norm, leaky ReLU; the number of channels stays."""

  size: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], *, train: bool = False
  ) -> Float[Array, 'b n d']:
    conv = SpectralConv(x.shape[-1], self.size, self.dtype, name='conv')
    norm = BatchNorm(dtype=self.dtype, name='norm')
    return nn.leaky_relu(norm(conv(x, train=train), train=train), SLOPE)


class Head(nn.Module):
  """Computes one logit per patch from its neighbours in raster order.

  Attributes:
    kernel: positions that the second convolution sees, an odd number.
    dtype: of the convolutions; logits are float32.
  """

  kernel: int = 9
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b n d'], *, train: bool = False
  ) -> Float[Array, 'b n']:
    x = Layer(1, self.dtype, name='embed')(x, train=train)
    around = Layer(self.kernel, self.dtype, name='around')(x, train=train)
    # The sum of two terms of unit variance, scaled back to unit variance.
    x = (x + around) * math.sqrt(0.5)
    # Losses take differences of logits; bfloat16 would keep two digits.
    return SpectralConv(1, name='logit')(x, train=train)[..., 0]


class DinoDiscriminator(nn.Module):
  """Judges images by small heads on the activations of a frozen DINO trunk.

  The design of StyleGAN-T (Sauer et al., 2023). The frozen trunk
  (`pretrained.dino`) knows images already, so heads learn fast and can be
  small: there is one for each depth of the trunk, with a logit for each of its
  patches.

  Attributes:
    kernel: positions that a head's second convolution sees, an odd number.
    dtype: of the convolutions; parameters, statistics and logits are float32.
  """

  kernel: int = 9
  dtype: str = 'float32'

  def check(self) -> None:
    """Raises ConfigError for fields that cannot be used."""
    name = 'discriminator.dino.kernel'
    errors.require(self.kernel >= 1, name, self.kernel, '1 or more')
    wanted = 'an odd number, with a position in its middle'
    errors.require(self.kernel % 2 == 1, name, self.kernel, wanted)
    errors.require_choice('model.dtype', self.dtype, layers.DTYPES)

  @nn.compact
  def __call__(
    self, activations: Sequence[Float[Array, 'b n d']], *, train: bool = False
  ) -> Float[Array, 'b m']:
    """Returns logits, high for real and low for fake, head after head.

    Args:
      activations: outputs of the trunk's depths, the shallowest first.
      train: normalise with the batch's own statistics, and update NORMS.

    Raises:
      ConfigError: fields that `check` refuses.
    """
    self.check()
    logits = [
      Head(self.kernel, self.dtype, name=f'head_{i}')(x, train=train)
      for i, x in enumerate(activations)
    ]
    return jnp.concatenate(logits, axis=1)


def blur(
  x: Float[Array, 'b h w c'], *, padding: int, stride: int = 1
) -> Float[Array, 'b p q c']:
  """Blurs images with the low-pass filter [1, 3, 3, 1] / 8 along both axes.

  The image is padded with zeros on all sides; each side of the result has
  floor((side + 2 padding - 4) / stride) + 1 pixels. Filtering before a stride
  keeps high frequencies from folding into low ones.
  """
  # Sums of shifted images: a grouped convolution of one channel each, the usual
  # way, is slow on CPU. The filter is separable, so two passes of 4 taps do.
  for axis in (1, 2):
    pad = [(0, 0)] * 4
    pad[axis] = (padding, padding)
    padded = jnp.pad(x, pad)
    size = padded.shape[axis] - len(BLUR) + 1
    shifted = [
      weight
      * jax.lax.slice_in_dim(padded, shift, shift + size, stride, axis=axis)
      for shift, weight in enumerate(BLUR)
    ]
    # Begin with an array: the integer 0 of a plain sum is one more addition.
    x = sum(shifted[1:], shifted[0])
  return x


def minibatch_deviation(
  x: Float[Array, 'b h w c'], group: int
) -> Float[Array, 'b h w 1']:
  """Returns the mean standard deviation within groups of images, as a channel.

  It lets a discriminator notice that fakes are too much alike (Karras et al.,
  2018). Groups have gcd(b, group) members. Pass real and fake images in
  separate batches, or in halves of a multiple of `group`: a group must not mix
  them.
  """
  b, h, w, c = x.shape
  members = math.gcd(b, group)
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  # Neighbours in the batch form a group: they lie on the same device, so the
  # statistic needs no communication.
  variance = jnp.var(wide.reshape(b // members, members, h, w, c), axis=1)
  # The root has no gradient at 0, where groups of one always are.
  deviation = jnp.mean(jnp.sqrt(variance + 1e-8), axis=(1, 2, 3))
  channel = jnp.repeat(deviation, members)[:, None, None, None]
  return jnp.broadcast_to(channel, (b, h, w, 1)).astype(x.dtype)


class DownBlock(nn.Module):
  """Halves the grid with a residual block: two 3x3 convolutions, a 1x1 skip.

  A blur precedes every stride, against aliasing.
  """

  features: int
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Float[Array, 'b h w c']) -> Float[Array, 'b p q d']:
    skip = blur(x, padding=1, stride=2)
    skip = _conv(self.features, 1, self.dtype, name='skip', use_bias=False)(
      skip
    )
    x = _conv(x.shape[-1], 3, self.dtype, name='first', padding=1)(x)
    # Padding 2 here and none in the strided convolution give the skip's grid.
    x = blur(nn.leaky_relu(x, SLOPE), padding=2)
    x = _conv(self.features, 3, self.dtype, name='second', stride=2)(x)
    return (nn.leaky_relu(x, SLOPE) + skip) * math.sqrt(0.5)


class StyleGanDiscriminator(nn.Module):
  """The paper's "StyleGAN-like" discriminator, with one logit per image.

  It is trained from scratch. It has residual blocks that halve the grid, a blur
  before every stride, leaky ReLUs, the standard deviation of a minibatch as a
  feature and no batch norm. It lacks StyleGAN's equalised learning rates: those
  are made for Adam at 2e-3, and at the tokenizer's 1e-4, which it shares,
  weights of unit size would barely move. Weights start as plain He normals.

  Attributes:
    width: channels at full resolution; doubled by every block. 64 for images
      of 256 pixels, 16 for 32 pixels on a CPU.
    max_width: largest number of channels.
    min_resolution: halve while the shorter side stays at least this long.
    group: size of the minibatch groups; see `minibatch_deviation`.
    dtype: of the convolutions; parameters and logits are float32.
  """

  width: int = 64
  max_width: int = 512
  min_resolution: int = 4
  group: int = 4
  dtype: str = 'float32'

  def check(self) -> None:
    """Raises ConfigError for fields that cannot be used."""
    for name in ('width', 'max_width', 'min_resolution', 'group'):
      value = getattr(self, name)
      key = f'discriminator.stylegan.{name}'
      errors.require(value >= 1, key, value, '1 or more')
    errors.require_choice('model.dtype', self.dtype, layers.DTYPES)

  @nn.compact
  def __call__(self, images: Float[Array, 'b h w 3']) -> Float[Array, ' b']:
    """Judges images in [-1, 1]: high for real, low for fake.

    The final layers read the whole last grid, so parameters belong to one image
    size.

    Raises:
      ConfigError: fields that `check` refuses, or a side that the blocks cannot
        halve evenly.
    """
    self.check()
    num_blocks = self._num_blocks(*images.shape[1:3])
    x = _conv(self.width, 1, self.dtype, name='from_rgb')(
      images.astype(self.dtype)
    )
    x = nn.leaky_relu(x, SLOPE)
    for i in range(num_blocks):
      features = min(self.width * 2 ** (i + 1), self.max_width)
      x = DownBlock(features, self.dtype, name=f'block_{i}')(x)
    x = jnp.concatenate([x, minibatch_deviation(x, self.group)], axis=-1)
    # Mix the extra channel in, back to the number of channels before it.
    x = _conv(x.shape[-1] - 1, 3, self.dtype, name='mix', padding=1)(x)
    x = nn.leaky_relu(x, SLOPE).reshape(x.shape[0], -1)
    x = nn.Dense(
      min(self.width * 2**num_blocks, self.max_width),
      dtype=self.dtype,
      precision=layers.precision(self.dtype),
      kernel_init=_HE_NORMAL,
      name='hidden',
    )(x)
    # Losses take differences of logits; bfloat16 would keep two digits.
    x = nn.leaky_relu(x, SLOPE).astype(jnp.float32)
    exact = layers.precision(x.dtype)
    return nn.Dense(1, precision=exact, name='logit')(x)[:, 0]

  def _num_blocks(self, height: int, width: int) -> int:
    """Returns how often the grid is halved; ConfigError if it cannot be."""
    shorter = min(height, width)
    if shorter < self.min_resolution:
      raise errors.ConfigError(
        f'the discriminator got images of {height}x{width} pixels and needs '
        f'at least {self.min_resolution}; lower '
        'discriminator.stylegan.min_resolution'
      )
    num_blocks = int(math.log2(shorter / self.min_resolution))
    if height % 2**num_blocks or width % 2**num_blocks:
      raise errors.ConfigError(
        f'the discriminator halves images {num_blocks} times and got '
        f'{height}x{width} pixels; use sides that are multiples of '
        f'{2**num_blocks} or raise discriminator.stylegan.min_resolution'
      )
    return num_blocks


def _conv(
  features: int,
  size: int,
  dtype: str,
  *,
  name: str,
  padding: int = 0,
  stride: int = 1,
  use_bias: bool = True,
) -> nn.Conv:
  return nn.Conv(
    features,
    (size, size),
    strides=(stride, stride),
    padding=((padding, padding), (padding, padding)),
    use_bias=use_bias,
    dtype=dtype,
    precision=layers.precision(dtype),
    kernel_init=_HE_NORMAL,
    name=name,
  )


def _unit(x: Float[Array, ' n']) -> Float[Array, ' n']:
  # The bound is that of torch's `normalize`, against a division by zero.
  return x / jnp.maximum(jnp.sqrt(_product(x, x)), 1e-12)


def _product(a: Float[Array, '...'], b: Float[Array, '...']) -> Array:
  # Accelerators would round to bfloat16 or TF32, and sigma with it.
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
