"""LPIPS v0.1: features of an image network, linearly weighted.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", 2018. The networks are torchvision's: arrays keep their names there,
kernels are HWIO.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from selfboottok_jax import errors
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import contract, weight_reader

Params = dict[str, Any]
Taps = list[Float[Array, 'b _ _ _']]


@dataclasses.dataclass(frozen=True)
class Backbone:
  """A network up to its last tapped layer.

  Attributes:
    kernels: name of a layer to the shape of its kernel, OIHW.
    widths: channels of each tapped activation.
    taps: computes these activations from parameters and images.
    min_image_size: pixels a side below which a layer would be empty.
    unused: arrays of a whole torchvision file that lie behind the last tap.
  """

  kernels: dict[str, tuple[int, int, int, int]]
  widths: tuple[int, ...]
  taps: Callable[[Params, Float[Array, 'b h w 3']], Taps]
  min_image_size: int
  unused: tuple[str, ...]


# Fire modules by their index in torchvision's `features`:
# (channels in, squeezed, expanded by the 1x1 and by the 3x3 convolution).
_FIRES = {
  3: (64, 16, 64),
  4: (128, 16, 64),
  6: (128, 32, 128),
  7: (256, 32, 128),
  9: (256, 48, 192),
  10: (384, 48, 192),
  11: (384, 64, 256),
  12: (512, 64, 256),
}
_STEM = 64
_POOLED_BEFORE = (3, 6, 9)
_TAPPED_AFTER = (4, 7, 9, 10, 11, 12)


def squeeze() -> Backbone:
  """SqueezeNet 1.1, tapped seven times."""
  kernels = {'features.0': (_STEM, 3, 3, 3)}
  for index, (width, squeezed, expanded) in _FIRES.items():
    name = f'features.{index}'
    kernels[f'{name}.squeeze'] = (squeezed, width, 1, 1)
    kernels[f'{name}.expand1x1'] = (expanded, squeezed, 1, 1)
    kernels[f'{name}.expand3x3'] = (expanded, squeezed, 3, 3)
  widths = (_STEM, *(2 * _FIRES[i][2] for i in _TAPPED_AFTER))
  unused = ('classifier.1.weight', 'classifier.1.bias')
  return Backbone(kernels, widths, _squeeze_taps, 32, unused)


def _squeeze_taps(params: Params, x: Float[Array, 'b h w 3']) -> Taps:
  x = _convolve(params, 'features.0', x, stride=2)
  taps = [x]
  for index in _FIRES:
    if index in _POOLED_BEFORE:
      x = max_pool(x)
    name = f'features.{index}'
    x = _convolve(params, f'{name}.squeeze', x)
    x = jnp.concatenate(
      [
        _convolve(params, f'{name}.expand1x1', x),
        _convolve(params, f'{name}.expand3x3', x, padding=1),
      ],
      axis=-1,
    )
    if index in _TAPPED_AFTER:
      taps.append(x)
  return taps


VGG16_WIDTHS = (64, 128, 256, 512, 512)
# Convolutions by stage, by their index in torchvision's `features`.
_VGG_STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_DENSE = tuple(
  f'classifier.{i}.{kind}' for i in (0, 3, 6) for kind in ('weight', 'bias')
)


def vgg(widths: tuple[int, ...] = VGG16_WIDTHS) -> Backbone:
  """VGG16, tapped at the end of each of its five stages."""
  kernels, width = {}, 3
  for stage, indices in enumerate(_VGG_STAGES):
    for index in indices:
      kernels[f'features.{index}'] = (widths[stage], width, 3, 3)
      width = widths[stage]
  return Backbone(kernels, widths, _vgg_taps, 16, _DENSE)


def _vgg_taps(params: Params, x: Float[Array, 'b h w 3']) -> Taps:
  taps = []
  for stage, indices in enumerate(_VGG_STAGES):
    if stage:
      x = nn.max_pool(x, (2, 2), (2, 2))
    for index in indices:
      x = _convolve(params, f'features.{index}', x, padding=1)
    taps.append(x)
  return taps


# (index in torchvision's `features`, channels, kernel, stride, padding)
_ALEX = (
  (0, 64, 11, 4, 2),
  (3, 192, 5, 1, 2),
  (6, 384, 3, 1, 1),
  (8, 256, 3, 1, 1),
  (10, 256, 3, 1, 1),
)
_ALEX_POOLED_BEFORE = (3, 6)
_ALEX_DENSE = tuple(
  f'classifier.{i}.{kind}' for i in (1, 4, 6) for kind in ('weight', 'bias')
)


def alex() -> Backbone:
  """AlexNet, tapped after each of its five convolutions."""
  kernels, width = {}, 3
  for index, channels, size, _, _ in _ALEX:
    kernels[f'features.{index}'] = (channels, width, size, size)
    width = channels
  widths = tuple(channels for _, channels, _, _, _ in _ALEX)
  return Backbone(kernels, widths, _alex_taps, 31, _ALEX_DENSE)


def _alex_taps(params: Params, x: Float[Array, 'b h w 3']) -> Taps:
  taps = []
  for index, _, _, stride, padding in _ALEX:
    if index in _ALEX_POOLED_BEFORE:
      x = nn.max_pool(x, (3, 3), (2, 2))
    x = _convolve(params, f'features.{index}', x, stride, padding)
    taps.append(x)
  return taps


BACKBONES = {'squeeze': squeeze, 'vgg': vgg, 'alex': alex}


def _convolve(
  params: dict[str, Any],
  name: str,
  x: Float[Array, 'b h w c'],
  stride: int = 1,
  padding: int = 0,
) -> Float[Array, 'b _ _ _']:
  """Convolution, bias and ReLU."""
  x = jax.lax.conv_general_dilated(
    x,
    params[f'{name}.weight'].astype(x.dtype),
    window_strides=(stride, stride),
    padding=((padding, padding), (padding, padding)),
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=layers.precision(x.dtype),
  )
  bias = params[f'{name}.bias'].astype(x.dtype)
  return nn.relu(x + bias.reshape(1, 1, 1, -1))


def max_pool(x: Float[Array, 'b h w c']) -> Float[Array, 'b _ _ c']:
  """3x3, stride 2, with torch's ceil mode: a last window may overhang."""
  overhang = [(0, -(size - 3) % 2) for size in x.shape[1:3]]
  return nn.max_pool(x, (3, 3), (2, 2), padding=overhang)


# Mean and deviation of ImageNet photographs on the scale of [-1, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188])
_SCALE = np.array([0.458, 0.448, 0.450])
_EPSILON = 1e-10

_HEAD = re.compile(r'(lin\d+)\.model\.1\.weight')
_SLICE = re.compile(r'^net\.slice\d+\.')
# Arrays of the package that repeat constants of its code, and the heads.
_REPEATED = ('scaling_layer.*', 'lins.*')


def _publish(backbone: str, heads: str, millions: float) -> contract.Published:
  return contract.Published(
    '',
    (backbone, heads),
    'BSD-3-Clause and BSD-2-Clause',
    millions,
    'perceptual distance',
    f'https://download.pytorch.org/models/{backbone} and https://github.com/'
    'richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1',
  )


PUBLISHED = {
  'squeeze': _publish('squeezenet1_1-b8a52dc0.pth', 'squeeze.pth', 0.7),
  'vgg': _publish('vgg16-397923af.pth', 'vgg.pth', 14.7),
  'alex': _publish('alexnet-owt-7be5be79.pth', 'alex.pth', 2.5),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Lpips:
  """LPIPS of images in [-1, 1], from the backbone's least size up.

  Attributes:
    backbone: network whose activations are compared.
    name: name in reports.
    published: place of its weights.
    dtype: type of the convolutions; their differences are float32.
    params: float32 arrays by the file's names, kernels as HWIO; None until
      they are loaded.
  """

  backbone: Backbone
  name: str
  published: contract.Published | None = None
  dtype: str = 'float32'
  params: Any = None

  @property
  def shape_key(self) -> dict[str, Any]:
    """Parameters depend on the file alone."""
    return {}

  def init(self, key: Any) -> dict[str, Array]:
    """Random parameters that keep activations of order 1."""
    zeros = assemble(weight_reader.Reader({}), self.backbone)
    params = {}
    for index, (name, array) in enumerate(zeros.items()):
      draw, shape = jax.random.fold_in(key, index), array.shape
      if len(shape) == 4:
        gain = np.sqrt(2 / np.prod(shape[:3]))
        params[name] = gain * jax.random.normal(draw, shape)
      elif name.startswith('lpips.'):
        params[name] = jax.random.uniform(draw, shape)
      else:
        params[name] = jnp.zeros(shape)
    return params

  def read(
    self, arrays: Mapping[str, np.ndarray], source: str
  ) -> dict[str, np.ndarray]:
    """Parameters from the arrays of a file, or of several.

    The backbone has torchvision's names (`features.3.squeeze.weight`, OIHW), or
    those of the `lpips` package and of taming
    (`net.slice2.3.squeeze.weight`); a head is theirs, `lin0.model.1.weight` of
    shape [1, c, 1, 1], or `lpips.lin0` of shape [c].

    Raises:
      WeightsError: what is missing, unexpected, of another shape or not finite.
    """
    renamed = {}
    for key, array in arrays.items():
      if match := _HEAD.fullmatch(key):
        renamed[f'lpips.{match[1]}'] = array.reshape(-1)
      else:
        renamed[_SLICE.sub('features.', key)] = array
    reader = weight_reader.Reader(renamed)
    params = assemble(reader, self.backbone)
    reader.check(self.name, source, (*self.backbone.unused, *_REPEATED))
    return params

  def __call__(
    self,
    params: dict[str, Any],
    a: Float[Array, 'b h w 3'],
    b: Float[Array, 'b h w 3'],
  ) -> Float[Array, 'b']:
    """The distance of each pair: the sum over the layers."""
    return self.per_layer(params, a, b).sum(axis=-1)

  def per_layer(
    self,
    params: dict[str, Any],
    a: Float[Array, 'b h w 3'],
    b: Float[Array, 'b h w 3'],
  ) -> Float[Array, 'b _']:
    """The share of each tapped layer in the distance."""
    least = self.backbone.min_image_size
    if min(a.shape[1:3]) < least:
      raise errors.UserError(
        f'{self.name} got {a.shape[1]}x{a.shape[2]} images, wanted {least} '
        "pixels or more a side; use larger images or perceptual='hog'"
      )
    both = zip(self._taps(params, a), self._taps(params, b), strict=True)
    result = []
    for i, (from_a, from_b) in enumerate(both):
      squared = jnp.square(_unit(from_a) - _unit(from_b))
      head = params[f'lpips.lin{i}'].astype(squared.dtype)
      exact = layers.precision(squared.dtype)
      weighted = jnp.einsum('bhwc,c->bhw', squared, head, precision=exact)
      result.append(weighted.mean(axis=(1, 2)))
    return jnp.stack(result, axis=-1)

  def _taps(
    self, params: dict[str, Any], images: Float[Array, 'b h w 3']
  ) -> Taps:
    """Activations that are compared, of images in [-1, 1]."""
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    shift, scale = (
      v.astype(x.dtype).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE)
    )
    x = (x - shift) / scale
    # A caller in float64 (tests compare with it) keeps it.
    narrow = x.astype(self.dtype) if self.dtype != 'float32' else x
    return [tap.astype(x.dtype) for tap in self.backbone.taps(params, narrow)]


def build(network: str, dtype: str = 'float32') -> Lpips:
  """LPIPS without its weights, of one of BACKBONES, convolving in `dtype`.

  Its source is the two files of PUBLISHED in a folder or one after the other,
  or one file of either `lpips` package or ours, see `Lpips.read`.
  """
  name = f'lpips_{network}'
  contract.check_options(name, dtype=dtype)
  return Lpips(BACKBONES[network](), name, PUBLISHED[network], dtype)


def assemble(
  reader: weight_reader.Reader, backbone: Backbone
) -> dict[str, np.ndarray]:
  """Collects kernels, biases and heads under the names of the cached file."""
  params = {}
  for name, (outputs, inputs, *window) in backbone.kernels.items():
    layer = reader.conv(name, inputs, outputs, *window)
    params[f'{name}.weight'] = layer['kernel']
    params[f'{name}.bias'] = layer['bias']
  for index, width in enumerate(backbone.widths):
    params[f'lpips.lin{index}'] = reader.take(f'lpips.lin{index}', width)
  return params


def _unit(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """Unit length over channels; zero stays zero, and so does its gradient."""
  squared = jnp.square(x).sum(axis=-1, keepdims=True)
  # The root's gradient at 0 is infinite, and inf * 0 = nan, unless both the
  # root and the quotient are kept from ever seeing 0.
  norm = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
  return jnp.where(squared > 0, x / (norm + _EPSILON), 0.0)
