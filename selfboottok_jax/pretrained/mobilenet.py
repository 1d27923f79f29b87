"""MobileNetV2 1.0, a small ImageNet network for development and small runs.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
Its pooled features give `fd_mobilenet_v2`, its stride-16 map is a teacher.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import sizes
from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import contract, weight_reader

STRIDE = 16
NATIVE_SIZE = 224
STEM_WIDTH = 32
POOLED_WIDTH = 1280
CLASSES = 1001

# (expansion, width, repeats, stride of the first) of each group of blocks.
GROUPS = (
  (1, 16, 1, 1),
  (6, 24, 2, 2),
  (6, 32, 3, 2),
  (6, 64, 4, 2),
  (6, 96, 3, 1),
  (6, 160, 3, 2),
  (6, 320, 1, 1),
)
PATCH_GROUP = 4  # the last group at stride 16


@dataclasses.dataclass(frozen=True)
class _Layer:
  """One convolution: its name in the file, kernel shape (HWIO), stride."""

  name: str
  kernel: tuple[int, int, int, int]
  stride: int = 1
  linear: bool = False

  @property
  def groups(self) -> int:
    return self.kernel[3] if self.name.endswith('dw') else 1


def _blocks() -> list[tuple[int, list[_Layer]]]:
  """(group, its convolutions) of each inverted residual block, in order."""
  number, width, blocks = 1, STEM_WIDTH, []
  for group, (expansion, out, repeats, first_stride) in enumerate(GROUPS):
    for repeat in range(repeats):
      stride = first_stride if repeat == 0 else 1
      inner = expansion * width
      plan = [
        ('dw', (3, 3, 1, inner), stride, False),
        ('conv', (1, 1, inner, out), 1, True),
      ]
      if expansion > 1:
        plan.insert(0, ('conv', (1, 1, width, inner), 1, False))
      layers = []
      for kind, kernel, step, linear in plan:
        layers.append(_Layer(f'{number:02d}_{kind}', kernel, step, linear))
        number += 1
      blocks.append((group, layers))
      width = out
  return blocks


BLOCKS = _blocks()
_COUNT = 1 + sum(len(layers) for _, layers in BLOCKS)
STEM = _Layer('00_conv', (3, 3, 3, STEM_WIDTH), 2)
HEAD = _Layer(f'{_COUNT:02d}_conv', (1, 1, GROUPS[-1][1], POOLED_WIDTH))
CLASSIFIER = _Layer(
  f'{_COUNT + 1:02d}_conv', (1, 1, POOLED_WIDTH, CLASSES), linear=True
)


def _layers() -> list[_Layer]:
  inner = [layer for _, layers in BLOCKS for layer in layers]
  return [STEM, *inner, HEAD, CLASSIFIER]


@dataclasses.dataclass(frozen=True, eq=False)
class MobileNetV2:
  """MobileNetV2 with patches at stride 16 and a pooled vector as `cls`.

  Attributes:
    image_size: images are resized to this square, or (height, width), first
      (bilinear, half-pixel centres, antialiased where it shrinks); 224 is what
      the network was trained on. 0: images are taken as they come.
    params: name of a convolution to its float32 'kernel' (HWIO) and 'bias';
      None until they are loaded.
    name: name in reports.
    dim: width of a patch vector; `cls` has 1280 numbers.
  """

  image_size: sizes.Size = NATIVE_SIZE
  params: dict[str, dict[str, Any]] | None = None
  name: str = 'mobilenet_v2'
  dim: int = GROUPS[PATCH_GROUP][1]
  # The file is one that was made for this layout: nobody publishes it.
  published: None = None

  @property
  def shape_key(self) -> dict[str, Any]:
    """Parameters depend on the file alone."""
    return {}

  def __call__(
    self, params: dict[str, Any], images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Patches [b, n, 96] and pooled features [b, 1280] of [-1, 1] images."""
    patches, pooled = self._run(params, images)
    b, rows, columns, d = patches.shape
    return contract.Features(patches.reshape(b, rows * columns, d), pooled)

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches: 14x14 at 224."""
    height, width = sizes.pair(self.image_size or image_size)
    return -(-height // STRIDE), -(-width // STRIDE)

  def init(self, key: Any) -> PyTree:
    """Random parameters that keep activations of order 1."""
    layers = _layers()
    params = {}
    for layer, layer_key in zip(
      layers, jax.random.split(key, len(layers)), strict=True
    ):
      gain = np.sqrt(2 / np.prod(layer.kernel[:3]))
      params[layer.name] = {
        'kernel': gain * jax.random.normal(layer_key, layer.kernel),
        'bias': jnp.zeros(layer.kernel[3]),
      }
    return params

  def read(self, arrays: weight_reader.Arrays, source: str) -> PyTree:
    """Parameters from int8 kernels; WeightsError if the file is another's.

    The arrays are `NN_conv|dw_{w_int8,scale,bias}`: int8 kernels (HWIO), a
    scale per output channel, batch norm folded into both.
    """
    reader = weight_reader.Reader(arrays)
    params = assemble(reader)
    reader.check(self.name, source)
    return params

  def _run(
    self, params: dict[str, Any], images: Float[Array, 'b h w 3']
  ) -> tuple[Float[Array, 'b i j 96'], Float[Array, 'b 1280']]:
    """The map at stride 16, and the pooled features."""
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    if self.image_size:
      size = (x.shape[0], *sizes.pair(self.image_size), 3)
      x = jax.image.resize(x, size, 'bilinear')
    x = _convolve(params, STEM, x)
    patches = x
    for group, parts in BLOCKS:
      y = x
      for layer in parts:
        y = _convolve(params, layer, y)
      x = x + y if y.shape == x.shape else y
      patches = x if group <= PATCH_GROUP else patches
    return patches, _convolve(params, HEAD, x).mean(axis=(1, 2))


def assemble(reader: weight_reader.Reader) -> dict[str, dict[str, Any]]:
  """Parameters of `MobileNetV2` from the arrays of its file."""
  params = {}
  for layer in _layers():
    kernel = reader.take(f'{layer.name}_w_int8', *layer.kernel)
    scale = reader.take(f'{layer.name}_scale', layer.kernel[3])
    bias = reader.take(f'{layer.name}_bias', layer.kernel[3])
    params[layer.name] = {'kernel': kernel * scale, 'bias': bias}
  return params


def _convolve(
  params: dict[str, Any], layer: _Layer, x: Float[Array, 'b h w c']
) -> Float[Array, 'b _ _ _']:
  """TensorFlow's SAME convolution, bias and, unless linear, ReLU6."""
  weights = params[layer.name]
  x = jax.lax.conv_general_dilated(
    x,
    weights['kernel'].astype(x.dtype),
    window_strides=(layer.stride, layer.stride),
    padding='SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=layer.groups,
    precision=layers.precision(x.dtype),
  )
  x = x + weights['bias'].astype(x.dtype).reshape(1, 1, 1, -1)
  return x if layer.linear else jax.nn.relu6(x)
