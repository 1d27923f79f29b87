"""ConvNeXt, a convolutional network whose features Frechet distances compare.

Liu et al., "A ConvNet for the 2020s", 2022. Weights have timm's names.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from selfboottok_jax import sizes
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import (
  contract,
  resample,
  vision,
  weight_reader,
)

STRIDE = 32
_STEM, _WINDOW, _EXPANSION = 4, 7, 4


@dataclasses.dataclass(frozen=True)
class Size:
  """Blocks and channels of the four stages, and where weights are."""

  depths: tuple[int, int, int, int]
  widths: tuple[int, int, int, int]
  published: contract.Published


def _published(name: str, millions: float) -> contract.Published:
  return contract.Published(
    f'timm/{name}', ('model.safetensors',), 'Apache-2.0', millions, 'FD'
  )


NETWORKS = {
  'convnext_t': Size(
    (3, 3, 9, 3), (96, 192, 384, 768), _published('convnext_tiny.fb_in1k', 27.8)
  ),
  'convnext_b': Size(
    (3, 3, 27, 3),
    (128, 256, 512, 1024),
    _published('convnext_base.fb_in22k_ft_in1k', 87.6),
  ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ConvNext:
  """Patches are the last map, `cls` is its mean after the last norm.

  Attributes:
    name: one of NETWORKS.
    image_size: images are resized to it first, bicubic as for teachers.
    params: nested dicts of arrays; None until they are loaded.
  """

  name: str
  image_size: sizes.Size = 224
  params: Any = None

  @property
  def size(self) -> Size:
    """Its row of NETWORKS."""
    return NETWORKS[self.name]

  @property
  def dim(self) -> int:
    """Width of a patch vector, and of `cls`."""
    return self.size.widths[-1]

  @property
  def published(self) -> contract.Published:
    """Place of the weights."""
    return self.size.published

  @property
  def shape_key(self) -> dict[str, Any]:
    """Parameters depend on the file alone."""
    return {}

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches, whatever the size of the images."""
    del image_size
    return sizes.grid(self.image_size, STRIDE)

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Patches [b, n, d] and pooled features [b, d] of [-1, 1] images."""
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    x = resample.resize_images(x, sizes.pair(self.image_size))
    mean, deviation = (
      np.asarray(s, np.float32)[None, None, None] for s in vision.IMAGENET
    )
    x = ((x + 1) / 2 - mean) / deviation
    for index in range(len(self.size.depths)):
      stage = params[f'stage_{index}']
      if index == 0:
        x = _norm(_convolve(x, stage['down'], _STEM), stage['norm'])
      else:
        x = _convolve(_norm(x, stage['norm']), stage['down'], 2)
      x, _ = jax.lax.scan(_block, x, stage['blocks'])
    pooled = _norm(x.mean(axis=(1, 2)), params['norm'])
    return contract.Features(x.reshape(len(x), -1, self.dim), pooled)

  def init(self, key: PRNGKeyArray) -> PyTree:
    """Random parameters that keep activations of order 1; traceable."""
    shapes = self._assemble(weight_reader.Reader({}))
    leaves = jax.tree_util.tree_flatten_with_path(shapes)[0]
    total = sum(leaf.size for _, leaf in leaves)
    ends = np.cumsum([leaf.size for _, leaf in leaves])[:-1]
    # One draw for all, which compiles at once.
    parts = iter(jnp.split(jax.random.normal(key, (total,)), ends))

    def fill(path: Any, leaf: np.ndarray) -> Array:
      numbers, kind = next(parts).reshape(leaf.shape), path[-1].key
      if kind != 'kernel':
        return jnp.full(leaf.shape, {'scale': 1.0, 'gain': 0.3}.get(kind, 0.0))
      stacked = any(getattr(k, 'key', '') == 'blocks' for k in path)
      return numbers * math.sqrt(2 / math.prod(leaf.shape[stacked:-1]))

    return jax.tree_util.tree_map_with_path(fill, shapes)

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> PyTree:
    """Parameters from timm's state dict; WeightsError for others."""
    reader = weight_reader.Reader(arrays)
    params = self._assemble(reader)
    reader.check(self.name, source, ('head.fc.*',))
    return params

  def _assemble(self, reader: weight_reader.Reader) -> PyTree:
    """Parameters from the arrays of a state dict."""
    depths, widths = self.size.depths, self.size.widths
    params: dict[str, Any] = {'norm': reader.norm('head.norm', widths[-1])}
    for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
      stage = f'stages.{i}'
      if i == 0:
        down = reader.conv('stem.0', 3, width, _STEM, _STEM)
        norm = reader.norm('stem.1', width)
      else:
        down = reader.conv(f'{stage}.downsample.1', widths[i - 1], width, 2, 2)
        norm = reader.norm(f'{stage}.downsample.0', widths[i - 1])
      blocks = [
        _read_block(reader, f'{stage}.blocks.{j}', width) for j in range(depth)
      ]
      params[f'stage_{i}'] = {
        'down': down,
        'norm': norm,
        'blocks': weight_reader.stack(blocks),
      }
    return params


def _read_block(
  reader: weight_reader.Reader, name: str, width: int
) -> dict[str, Any]:
  return {
    'mix': reader.conv(f'{name}.conv_dw', 1, width, _WINDOW, _WINDOW),
    'norm': reader.norm(f'{name}.norm', width),
    'up': reader.linear(f'{name}.mlp.fc1', width, _EXPANSION * width),
    'down': reader.linear(f'{name}.mlp.fc2', _EXPANSION * width, width),
    'gain': reader.take(f'{name}.gamma', width),
  }


def _block(
  x: Float[Array, 'b h w c'], params: PyTree
) -> tuple[Float[Array, 'b h w c'], None]:
  """A depthwise convolution, a norm and an MLP, beside a residual branch."""
  y = _norm(_convolve(x, params['mix'], 1, groups=x.shape[-1]), params['norm'])
  y = jax.nn.gelu(_dense(y, params['up']), approximate=False)
  y = _dense(y, params['down'])
  return x + y * params['gain'].astype(x.dtype)[None, None, None], None


def _dense(x: Float[Array, '*b c'], params: PyTree) -> Float[Array, '*b d']:
  y = jnp.dot(
    x, params['kernel'].astype(x.dtype), precision=layers.precision(x.dtype)
  )
  return y + _along(params['bias'], y)


def _convolve(
  x: Float[Array, 'b h w c'], params: PyTree, stride: int, groups: int = 1
) -> Float[Array, 'b _ _ _']:
  y = jax.lax.conv_general_dilated(
    x,
    params['kernel'].astype(x.dtype),
    window_strides=(stride, stride),
    padding='VALID' if stride > 1 else 'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=groups,
    precision=layers.precision(x.dtype),
  )
  return y + _along(params['bias'], y)


def _norm(x: Float[Array, '*b c'], params: PyTree) -> Float[Array, '*b c']:
  shift = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(shift).mean(axis=-1, keepdims=True)
  y = shift * jax.lax.rsqrt(variance + layers.LAYER_NORM_EPSILON)
  return y * _along(params['scale'], y) + _along(params['bias'], y)


def _along(vector: Float[Array, 'c'], x: Float[Array, '*b c']) -> Array:
  """A vector of channels with as many axes as `x`."""
  return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
