"""The convolutional autoencoder of latent diffusion, VA-VAE and SD-VAE.

The second half reads published state dicts. Names are those of latent
diffusion's code (VA-VAE) and of diffusers' AutoencoderKL (SD-VAE), its early
hub files included.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import trees
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import weight_reader

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
    attend_last: True if the coarsest level attends after each block (VA-VAE).
    groups: number of groups of the group norms.
    dtype: type of the computation; means, variances and images are float32.
  """

  channels: tuple[int, ...]
  blocks: int = 2
  latent_dim: int = 32
  stem: int = 0
  attend_last: bool = True
  groups: int = 32
  dtype: str = 'float32'

  def setup(self) -> None:
    parts = _Parts(self.groups, self.dtype)
    fields = self.channels, self.blocks, self.attend_last, parts
    stem = self.stem or self.channels[0]
    self.encoder = ConvEncoder(2 * self.latent_dim, stem, *fields)
    self.decoder = ConvDecoder(*fields)
    # Of float32: what the rounding of these two adds is seen in every latent.
    exact = layers.precision(jnp.float32)
    self.quant = nn.Conv(2 * self.latent_dim, (1, 1), precision=exact)
    self.post_quant = nn.Conv(self.latent_dim, (1, 1), precision=exact)

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

  def conv(
    self, features: int, size: int, name: str, **options: Any
  ) -> nn.Conv:
    return nn.Conv(
      features,
      (size, size),
      dtype=self.dtype,
      precision=layers.precision(self.dtype),
      name=name,
      **options,
    )

  def dense(self, features: int, name: str) -> nn.Dense:
    exact = layers.precision(self.dtype)
    return nn.Dense(features, dtype=self.dtype, precision=exact, name=name)

  def norm(self, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
      self.groups, epsilon=_EPSILON, dtype=self.dtype, name=name
    )


class ConvEncoder(nn.Module):
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
        # One row and one column of zeros, below and to the right, as torch's
        # code pads before its strided convolution.
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


class ConvDecoder(nn.Module):
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
    mixed = layers.attend(q, k, v).reshape(x.shape)
    return x + self.parts.dense(c, 'out')(mixed)


def _level(
  x: Float[Array, 'b h w c'],
  level: int,
  width: int,
  count: int,
  parts: _Parts,
  attend: bool,
) -> Float[Array, 'b h w f']:
  """Runs `count` residual blocks, each followed by attention if `attend`."""
  for index in range(count):
    x = Residual(width, parts, name=f'level{level}_block{index}')(x)
    if attend:
      x = SelfAttention(parts, name=f'level{level}_attn{index}')(x)
  return x


def _middle(
  x: Float[Array, 'b h w c'], parts: _Parts
) -> Float[Array, 'b h w c']:
  """Two residual blocks around an attention, at the coarsest level."""
  width = x.shape[-1]
  x = Residual(width, parts, name='mid_block0')(x)
  x = SelfAttention(parts, name='mid_attn')(x)
  return Residual(width, parts, name='mid_block1')(x)


# Our part of a module to latent diffusion's.
_PARTS = {
  'norm1': 'norm1',
  'conv1': 'conv1',
  'norm2': 'norm2',
  'conv2': 'conv2',
  'shortcut': 'nin_shortcut',
  'norm': 'norm',
  'q': 'q',
  'k': 'k',
  'v': 'v',
  'out': 'proj_out',
}
_MODULES = {
  'quant': 'quant_conv',
  'post_quant': 'post_quant_conv',
  'norm': 'norm_out',
  'mid_block0': 'mid.block_1',
  'mid_block1': 'mid.block_2',
  'mid_attn': 'mid.attn_1',
}
_LEVEL = re.compile(r'level(\d+)_(block|attn|down|up)(\d*)')
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}

# diffusers' names to latent diffusion's, applied in this order.
_DIFFUSERS = (
  (r'\.attentions\.0\.group_norm\.', '.attentions.0.norm.'),
  (r'\.(?:to_q|query)\.', '.q.'),
  (r'\.(?:to_k|key)\.', '.k.'),
  (r'\.(?:to_v|value)\.', '.v.'),
  (r'\.(?:to_out\.0|proj_attn)\.', '.proj_out.'),
  (r'\.conv_shortcut\.', '.nin_shortcut.'),
  (r'\.conv_norm_out\.', '.norm_out.'),
  (r'\.mid_block\.resnets\.0\.', '.mid.block_1.'),
  (r'\.mid_block\.resnets\.1\.', '.mid.block_2.'),
  (r'\.mid_block\.attentions\.0\.', '.mid.attn_1.'),
  (r'\.down_blocks\.(\d+)\.resnets\.(\d+)\.', r'.down.\1.block.\2.'),
  (r'\.down_blocks\.(\d+)\.downsamplers\.0\.', r'.down.\1.downsample.'),
)
_UP = re.compile(r'\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.')


def read(
  arrays: weight_reader.Arrays,
  network: Autoencoder,
  source: str,
  unused: Collection[str] = (),
) -> PyTree:
  """Parameters of `network` from a state dict of either code.

  Args:
    arrays: by the names of the file.
    network: what the parameters are for.
    source: names the file in errors.
    unused: names that may be there and are left, as patterns.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite, in latent diffusion's names.
  """
  levels = len(network.channels)
  reader = weight_reader.Reader(
    {_to_latent_diffusion(name, levels): a for name, a in arrays.items()}
  )
  size = network.stride
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
  )['params']
  params = {
    path: _take(reader, _name(path.split('/')), leaf.shape)
    for path, leaf in trees.flatten(shapes, '/').items()
  }
  reader.check('autoencoder', source, unused)
  return trees.unflatten(params, '/')


def _to_latent_diffusion(name: str, levels: int) -> str:
  """The name in latent diffusion's code of an array of either code."""
  for pattern, replacement in _DIFFUSERS:
    name = re.sub(pattern, replacement, name)

  def up(match: re.Match[str]) -> str:
    # There the coarsest level comes first.
    level = levels - 1 - int(match[1])
    if match[2] == 'resnets':
      return f'.up.{level}.block.{match[3]}.'
    return f'.up.{level}.upsample.'

  return _UP.sub(up, name)


def _name(keys: list[str]) -> str:
  """The name in latent diffusion's code of the leaf at a path of ours."""
  *modules, leaf = keys
  parts = []
  for index, module in enumerate(modules):
    if match := _LEVEL.fullmatch(module):
      level, kind, number = match.groups()
      side = 'down' if modules[0] == 'encoder' else 'up'
      if kind in ('down', 'up'):
        parts.append(f'{side}.{level}.{side}sample.conv')
      else:
        parts.append(f'{side}.{level}.{kind}.{number}')
    elif index == 2:
      parts.append(_PARTS[module])
    else:
      parts.append(_MODULES.get(module, module))
  return '.'.join([*parts, _LEAVES[leaf]])


def _take(
  reader: weight_reader.Reader, name: str, shape: tuple[int, ...]
) -> Any:
  """The array for a leaf of `shape` of ours."""
  if len(shape) == 4:
    height, width, inputs, outputs = shape
    array = reader.take(name, outputs, inputs, height, width)
    return array.transpose(2, 3, 1, 0)
  if len(shape) == 2:
    # Attention is made of matrices in diffusers, of 1x1 convolutions elsewhere.
    is_conv = getattr(reader.arrays.get(name), 'ndim', 2) == 4
    window = (1, 1) if is_conv else ()
    return reader.take(name, *shape[::-1], *window).reshape(shape[::-1]).T
  return reader.take(name, *shape)
