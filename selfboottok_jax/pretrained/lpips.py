"""LPIPS v0.1: features of an image network, linearly weighted.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", 2018.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from selfboottok_jax import errors
from selfboottok_jax.pretrained import convert, lpips_backbones

# Of ImageNet photographs on the scale of [-1, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188])
_SCALE = np.array([0.458, 0.448, 0.450])
_EPSILON = 1e-10


def shapes(
  backbone: lpips_backbones.Backbone,
) -> dict[str, tuple[int, ...]]:
  """Name to shape (OIHW) of every array of a weight file that is used."""
  both = {}
  for name, shape in backbone.kernels.items():
    both[f'{name}.weight'] = shape
    both[f'{name}.bias'] = shape[:1]
  heads = {f'lpips.lin{i}': (w,) for i, w in enumerate(backbone.widths)}
  return both | heads


@dataclasses.dataclass(frozen=True, eq=False)
class Lpips:
  """LPIPS of images in [-1, 1], from the backbone's least size up.

  Attributes:
    params: float32 arrays by the file's names, kernels as HWIO.
    backbone: whose activations are compared.
    name: what reports call it.
  """

  params: dict[str, Any]
  backbone: lpips_backbones.Backbone
  name: str

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
      result.append(jnp.einsum('bhwc,c->bhw', squared, head).mean(axis=(1, 2)))
    return jnp.stack(result, axis=-1)

  def _taps(self, params, images):
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    shift, scale = (
      v.astype(x.dtype).reshape(1, 1, 1, 3) for v in (_SHIFT, _SCALE)
    )
    return self.backbone.taps(params, (x - shift) / scale)


def load(path: str, network: str) -> Lpips:
  """Reads torchvision's network with LPIPS' heads from an .npz file.

  Args:
    path: the file; names are torchvision's (`features.3.squeeze.weight`, OIHW)
      and `lpips.lin0` onwards; float16 or float32.
    network: one of BACKBONES: 'squeeze', 'vgg', 'alex'.

  Raises:
    WeightsError: see `convert`.
  """
  backbone, name = lpips_backbones.BACKBONES[network](), f'lpips_{network}'
  arrays = convert.read_npz(path, shapes(backbone), name, backbone.unused)
  return Lpips(_to_params(arrays), backbone, name)


def load_squeeze(path: str) -> Lpips:
  """SqueezeNet 1.1, see `load`."""
  return load(path, 'squeeze')


def load_vgg(path: str) -> Lpips:
  """VGG16, see `load`."""
  return load(path, 'vgg')


def load_alex(path: str) -> Lpips:
  """AlexNet, see `load`."""
  return load(path, 'alex')


def from_package(
  arrays: Mapping[str, np.ndarray],
  backbone: lpips_backbones.Backbone,
  name: str,
) -> Lpips:
  """Takes the state dict of the `lpips` package's `LPIPS`, or of taming's.

  There the backbone is `net.slice{n}.{index}` and a head
  `lin{k}.model.1.weight` of shape [1, c, 1, 1]; `lins.k` repeats it.
  """
  renamed = {}
  for name, array in arrays.items():
    parts = name.split('.')
    if parts[0] == 'net':
      renamed['.'.join(['features', *parts[2:]])] = array
    elif parts[0].startswith('lin') and parts[0] != 'lins':
      renamed[f'lpips.{parts[0]}'] = array.reshape(-1)
  convert.check(renamed, shapes(backbone), name, 'the lpips state dict')
  return Lpips(_to_params(renamed), backbone, name)


def _to_params(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  params = {}
  for name, array in arrays.items():
    kernel = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    params[name] = jnp.asarray(kernel, jnp.float32)
  return params


def _unit(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """Unit length over channels; zero stays zero, and so does its gradient."""
  squared = jnp.square(x).sum(axis=-1, keepdims=True)
  # The root's gradient at 0 is infinite, and inf * 0 = nan, unless both the
  # root and the quotient are kept from ever seeing 0.
  norm = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
  return jnp.where(squared > 0, x / (norm + _EPSILON), 0.0)
