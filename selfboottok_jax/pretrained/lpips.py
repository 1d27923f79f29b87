"""LPIPS v0.1 'squeeze': SqueezeNet 1.1 features, linearly weighted.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", 2018.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from selfboottok_jax import errors
from selfboottok_jax.pretrained import convert

MIN_IMAGE_SIZE = 32

# Fire modules by their index in torchvision's `features`:
# (channels in, squeezed, expanded by the 1x1 and by the 3x3 convolution).
FIRES = {
  3: (64, 16, 64),
  4: (128, 16, 64),
  6: (128, 32, 128),
  7: (256, 32, 128),
  9: (256, 48, 192),
  10: (384, 48, 192),
  11: (384, 64, 256),
  12: (512, 64, 256),
}
STEM_WIDTH = 64
POOLED_BEFORE = (3, 6, 9)
TAPPED_AFTER = (4, 7, 9, 10, 11, 12)
TAP_WIDTHS = (STEM_WIDTH, *(2 * FIRES[i][2] for i in TAPPED_AFTER))

# Of ImageNet photographs on the scale of [-1, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188])
_SCALE = np.array([0.458, 0.448, 0.450])
_EPSILON = 1e-10


def shapes() -> dict[str, tuple[int, ...]]:
  """Name to shape (OIHW) of every array of the weight file that is used."""
  result = {'features.0': (STEM_WIDTH, 3, 3, 3)}
  for index, (width, squeezed, expanded) in FIRES.items():
    name = f'features.{index}'
    result[f'{name}.squeeze'] = (squeezed, width, 1, 1)
    result[f'{name}.expand1x1'] = (expanded, squeezed, 1, 1)
    result[f'{name}.expand3x3'] = (expanded, squeezed, 3, 3)
  both = {}
  for name, shape in result.items():
    both[f'{name}.weight'] = shape
    both[f'{name}.bias'] = shape[:1]
  heads = {f'lpips.lin{i}': (width,) for i, width in enumerate(TAP_WIDTHS)}
  return both | heads


@dataclasses.dataclass(frozen=True, eq=False)
class Lpips:
  """LPIPS-squeeze of images in [-1, 1], any size from 32 pixels up.

  Attributes:
    params: float32 arrays by the file's names, kernels as HWIO.
    name: what reports call it.
  """

  params: dict[str, Any]
  name: str = 'lpips_squeeze'

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
  ) -> Float[Array, 'b 7']:
    """The share of each tapped layer in the distance."""
    if min(a.shape[1:3]) < MIN_IMAGE_SIZE:
      raise errors.UserError(
        f'lpips_squeeze got {a.shape[1]}x{a.shape[2]} images, wanted '
        f'{MIN_IMAGE_SIZE} pixels or more a side; use larger images or '
        "perceptual='hog'"
      )
    both = zip(_taps(params, a), _taps(params, b), strict=True)
    result = []
    for i, (from_a, from_b) in enumerate(both):
      squared = jnp.square(_unit(from_a) - _unit(from_b))
      head = params[f'lpips.lin{i}'].astype(squared.dtype)
      result.append(jnp.einsum('bhwc,c->bhw', squared, head).mean(axis=(1, 2)))
    return jnp.stack(result, axis=-1)


def load_squeeze(path: str) -> Lpips:
  """Reads torchvision's SqueezeNet 1.1 with LPIPS' heads from an .npz file.

  The names are torchvision's (`features.3.squeeze.weight`, OIHW) and
  `lpips.lin0..6`; float16 or float32. Raises WeightsError, see `convert`.
  """
  classifier = ('classifier.1.weight', 'classifier.1.bias')
  arrays = convert.read_npz(path, shapes(), 'lpips_squeeze', classifier)
  return Lpips(params=_to_params(arrays))


def from_package(arrays: Mapping[str, np.ndarray]) -> Lpips:
  """Takes the state dict of the `lpips` package's `LPIPS(net='squeeze')`.

  There the backbone is `net.slice{1..7}.{index}` and a head
  `lin{k}.model.1.weight` of shape [1, c, 1, 1]; `lins.k` repeats it.
  """
  renamed = {}
  for name, array in arrays.items():
    parts = name.split('.')
    if parts[0] == 'net':
      renamed['.'.join(['features', *parts[2:]])] = array
    elif parts[0].startswith('lin') and parts[0] != 'lins':
      renamed[f'lpips.{parts[0]}'] = array.reshape(-1)
  convert.check(renamed, shapes(), 'lpips_squeeze', 'the lpips state dict')
  return Lpips(params=_to_params(renamed))


def _to_params(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  params = {}
  for name, array in arrays.items():
    kernel = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    params[name] = jnp.asarray(kernel, jnp.float32)
  return params


def _taps(
  params: dict[str, Any], images: Float[Array, 'b h w 3']
) -> list[Float[Array, 'b _ _ _']]:
  """The seven activations that LPIPS compares."""
  x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
  shift, scale = (
    v.astype(x.dtype).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE)
  )
  x = _convolve(params, 'features.0', (x - shift) / scale, stride=2)
  taps = [x]
  for index in FIRES:
    if index in POOLED_BEFORE:
      x = _max_pool(x)
    name = f'features.{index}'
    x = _convolve(params, f'{name}.squeeze', x)
    x = jnp.concatenate(
      [
        _convolve(params, f'{name}.expand1x1', x),
        _convolve(params, f'{name}.expand3x3', x, padding=1),
      ],
      axis=-1,
    )
    if index in TAPPED_AFTER:
      taps.append(x)
  return taps


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


def _max_pool(x: Float[Array, 'b h w c']) -> Float[Array, 'b _ _ c']:
  """3x3, stride 2, with torch's ceil mode: a last window may overhang."""
  overhang = [(0, -(size - 3) % 2) for size in x.shape[1:3]]
  return nn.max_pool(x, (3, 3), (2, 2), padding=overhang)


def _unit(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """Unit length over channels; zero stays zero, and so does its gradient."""
  squared = jnp.square(x).sum(axis=-1, keepdims=True)
  # The root's gradient at 0 is infinite, and inf * 0 = nan, unless both the
  # root and the quotient are kept from ever seeing 0.
  norm = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
  return jnp.where(squared > 0, x / (norm + _EPSILON), 0.0)
