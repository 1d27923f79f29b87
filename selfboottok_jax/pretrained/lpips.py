"""LPIPS v0.1: features of an image network, linearly weighted.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", 2018.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from selfboottok_jax import errors
from selfboottok_jax.pretrained import convert, lpips_backbones
from selfboottok_jax.pretrained import published as published_lib

# Of ImageNet photographs on the scale of [-1, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188])
_SCALE = np.array([0.458, 0.448, 0.450])
_EPSILON = 1e-10

_HEAD = re.compile(r'(lin\d+)\.model\.1\.weight')
_SLICE = re.compile(r'^net\.slice\d+\.')
# Constants of the code, and the heads once more.
_REPEATED = ('scaling_layer.*', 'lins.*')


def _publish(
  backbone: str, heads: str, millions: float
) -> published_lib.Published:
  return published_lib.Published(
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
    backbone: whose activations are compared.
    name: what reports call it.
    published: where its weights are.
    params: float32 arrays by the file's names, kernels as HWIO; None until
      they are loaded.
  """

  backbone: lpips_backbones.Backbone
  name: str
  published: published_lib.Published | None = None
  params: Any = None

  @property
  def shape_key(self) -> dict[str, Any]:
    """Parameters depend on the file alone."""
    return {}

  def init(self, key: Any) -> dict[str, Array]:
    """Random parameters that keep activations of order 1."""
    wanted = shapes(self.backbone)
    params = {}
    for index, (name, shape) in enumerate(wanted.items()):
      draw = jax.random.fold_in(key, index)
      if len(shape) == 4:
        out, into, height, width = shape
        gain = np.sqrt(2 / (into * height * width))
        kernel = (height, width, into, out)
        params[name] = gain * jax.random.normal(draw, kernel)
      elif name.startswith('lpips.'):
        params[name] = jax.random.uniform(draw, shape)
      else:
        params[name] = jnp.zeros(shape)
    return params

  def read(
    self, arrays: Mapping[str, np.ndarray], source: str
  ) -> dict[str, np.ndarray]:
    """Parameters from the arrays of a file, or of several; see `read`."""
    return read(arrays, self.backbone, self.name, source)

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


def build(network: str) -> Lpips:
  """LPIPS without its weights, of one of `lpips_backbones.BACKBONES`.

  Its source is the two files of PUBLISHED in a folder or one after the other,
  or one file of either `lpips` package or ours, see `read`.
  """
  backbone = lpips_backbones.BACKBONES[network]()
  return Lpips(backbone, f'lpips_{network}', PUBLISHED[network])


def read(
  arrays: Mapping[str, np.ndarray],
  backbone: lpips_backbones.Backbone,
  name: str,
  source: str,
) -> dict[str, np.ndarray]:
  """Parameters from the arrays of a file, or of several.

  The backbone has torchvision's names (`features.3.squeeze.weight`, OIHW), or
  those of the `lpips` package and of taming (`net.slice2.3.squeeze.weight`);
  a head is theirs, `lin0.model.1.weight` of shape [1, c, 1, 1], or `lpips.lin0`
  of shape [c].

  Raises:
    WeightsError: what is missing, unexpected, of another shape or not finite.
  """
  renamed = {}
  for key, array in arrays.items():
    if match := _HEAD.fullmatch(key):
      renamed[f'lpips.{match[1]}'] = array.reshape(-1)
    else:
      renamed[_SLICE.sub('features.', key)] = array
  wanted = shapes(backbone)
  unused = (*backbone.unused, *_REPEATED)
  convert.check(renamed, wanted, name, source, unused)
  return {key: np.asarray(_hwio(renamed[key]), np.float32) for key in wanted}


def from_package(
  arrays: Mapping[str, np.ndarray],
  backbone: lpips_backbones.Backbone,
  name: str,
) -> Lpips:
  """Takes the state dict of the `lpips` package's `LPIPS`, or of taming's."""
  params = read(arrays, backbone, name, 'the lpips state dict')
  return Lpips(backbone, name, params=jax.tree.map(jnp.asarray, params))


def _hwio(array: np.ndarray) -> np.ndarray:
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array


def _unit(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  """Unit length over channels; zero stays zero, and so does its gradient."""
  squared = jnp.square(x).sum(axis=-1, keepdims=True)
  # The root's gradient at 0 is infinite, and inf * 0 = nan, unless both the
  # root and the quotient are kept from ever seeing 0.
  norm = jnp.sqrt(jnp.where(squared > 0, squared, 1.0))
  return jnp.where(squared > 0, x / (norm + _EPSILON), 0.0)
