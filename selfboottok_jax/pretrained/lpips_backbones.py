"""The image networks whose activations LPIPS compares, as torchvision has them.

Arrays keep torchvision's names, kernels as HWIO. Inputs are normalised already.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
  )
  bias = params[f'{name}.bias'].astype(x.dtype)
  return nn.relu(x + bias.reshape(1, 1, 1, -1))


def max_pool(x: Float[Array, 'b h w c']) -> Float[Array, 'b _ _ c']:
  """3x3, stride 2, with torch's ceil mode: a last window may overhang."""
  overhang = [(0, -(size - 3) % 2) for size in x.shape[1:3]]
  return nn.max_pool(x, (3, 3), (2, 2), padding=overhang)
