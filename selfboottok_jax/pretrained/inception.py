"""Inception-v3 as Frechet distances are measured with it.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision",
2016, with the layers of TensorFlow's graph of 2015-12-05. That graph's pools
differ from torchvision's: an average skips what it pads, and the last block
takes a maximum where the others average. Weights have the names of pytorch-fid
and torch-fidelity, which are torchvision's.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from selfboottok_jax import errors, sizes
from selfboottok_jax.pretrained import contract, weight_reader

# Name of a layer to its 'kernel' (HWIO) and 'bias', batch norm folded in.
Params = dict[str, dict[str, Any]]
# A score is no place for bfloat16 passes or TF32, the defaults on accelerators.
PRECISION = jax.lax.Precision.HIGHEST
POOLED_WIDTH = 2048
CLASSES = 1008


@dataclasses.dataclass(frozen=True)
class Conv:
  """A convolution, its batch norm and a ReLU."""

  name: str
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = 'SAME'


def _average(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  return nn.avg_pool(x, (3, 3), (1, 1), 'SAME', count_include_pad=False)


def _maximum(x: Float[Array, 'b h w c']) -> Float[Array, 'b h w c']:
  return nn.max_pool(x, (3, 3), (1, 1), 'SAME')


def _halve(x: Float[Array, 'b h w c']) -> Float[Array, 'b _ _ c']:
  return nn.max_pool(x, (3, 3), (2, 2), 'VALID')


POOLS = {'average': _average, 'maximum': _maximum, 'halve': _halve}

# A step is a pool, a convolution, or convolutions side by side; a branch is
# steps in a row; a stage is branches side by side.
Step = str | Conv | tuple[Conv, ...]
Stage = tuple[tuple[Step, ...], ...]


def _reduce(name: str, features: int) -> Conv:
  return Conv(name, features, (3, 3), 2, 'VALID')


def _block_a(pooled: int) -> Stage:
  return (
    (Conv('branch1x1', 64),),
    (Conv('branch5x5_1', 48), Conv('branch5x5_2', 64, (5, 5))),
    (
      Conv('branch3x3dbl_1', 64),
      Conv('branch3x3dbl_2', 96, (3, 3)),
      Conv('branch3x3dbl_3', 96, (3, 3)),
    ),
    ('average', Conv('branch_pool', pooled)),
  )


_BLOCK_B: Stage = (
  (_reduce('branch3x3', 384),),
  (
    Conv('branch3x3dbl_1', 64),
    Conv('branch3x3dbl_2', 96, (3, 3)),
    _reduce('branch3x3dbl_3', 96),
  ),
  ('halve',),
)


def _block_c(inner: int) -> Stage:
  row, column = (1, 7), (7, 1)
  return (
    (Conv('branch1x1', 192),),
    (
      Conv('branch7x7_1', inner),
      Conv('branch7x7_2', inner, row),
      Conv('branch7x7_3', 192, column),
    ),
    (
      Conv('branch7x7dbl_1', inner),
      Conv('branch7x7dbl_2', inner, column),
      Conv('branch7x7dbl_3', inner, row),
      Conv('branch7x7dbl_4', inner, column),
      Conv('branch7x7dbl_5', 192, row),
    ),
    ('average', Conv('branch_pool', 192)),
  )


_BLOCK_D: Stage = (
  (Conv('branch3x3_1', 192), _reduce('branch3x3_2', 320)),
  (
    Conv('branch7x7x3_1', 192),
    Conv('branch7x7x3_2', 192, (1, 7)),
    Conv('branch7x7x3_3', 192, (7, 1)),
    _reduce('branch7x7x3_4', 192),
  ),
  ('halve',),
)


def _block_e(pool: str) -> Stage:
  def crossed(name: str) -> tuple[Conv, Conv]:
    return Conv(f'{name}a', 384, (1, 3)), Conv(f'{name}b', 384, (3, 1))

  return (
    (Conv('branch1x1', 320),),
    (Conv('branch3x3_1', 384), crossed('branch3x3_2')),
    (
      Conv('branch3x3dbl_1', 448),
      Conv('branch3x3dbl_2', 384, (3, 3)),
      crossed('branch3x3dbl_3'),
    ),
    (pool, Conv('branch_pool', 192)),
  )


def _alone(*arguments: Any) -> Stage:
  """One convolution, which the stage gives its name."""
  return ((Conv('', *arguments),),)


STAGES: dict[str, Stage] = {
  'Conv2d_1a_3x3': _alone(32, (3, 3), 2, 'VALID'),
  'Conv2d_2a_3x3': _alone(32, (3, 3), 1, 'VALID'),
  'Conv2d_2b_3x3': _alone(64, (3, 3)),
  'MaxPool_1': (('halve',),),
  'Conv2d_3b_1x1': _alone(80),
  'Conv2d_4a_3x3': _alone(192, (3, 3), 1, 'VALID'),
  'MaxPool_2': (('halve',),),
  'Mixed_5b': _block_a(32),
  'Mixed_5c': _block_a(64),
  'Mixed_5d': _block_a(64),
  'Mixed_6a': _BLOCK_B,
  'Mixed_6b': _block_c(128),
  'Mixed_6c': _block_c(160),
  'Mixed_6d': _block_c(160),
  'Mixed_6e': _block_c(192),
  'Mixed_7a': _BLOCK_D,
  'Mixed_7b': _block_e('average'),
  'Mixed_7c': _block_e('maximum'),
}


def kernels() -> dict[str, tuple[int, int, int, int]]:
  """Name of each convolution to the shape of its kernel, HWIO."""
  found, width = {}, 3
  for stage, branches in STAGES.items():
    total = 0
    for branch in branches:
      inner = width
      for step in branch:
        convs = [c for c in _side_by_side(step) if isinstance(c, Conv)]
        for conv in convs:
          found[_name(stage, conv)] = (*conv.kernel, inner, conv.features)
        inner = sum(conv.features for conv in convs) or inner
      total += inner
    width = total
  return found


def run_stage(
  params: Params, stage: str, x: Float[Array, 'b h w c']
) -> Float[Array, 'b _ _ _']:
  """One of STAGES: its branches' outputs, concatenated in the table's order."""
  outputs = []
  for branch in STAGES[stage]:
    y = x
    for step in branch:
      parts = [_run(params, stage, part, y) for part in _side_by_side(step)]
      y = jnp.concatenate(parts, axis=-1)
    outputs.append(y)
  return jnp.concatenate(outputs, axis=-1)


def run_all(
  params: Params, x: Float[Array, 'b h w 3']
) -> Iterator[tuple[str, Float[Array, 'b _ _ _']]]:
  """(name, activation) of every stage; x is normalised, 299 x 299."""
  for stage in STAGES:
    x = run_stage(params, stage, x)
    yield stage, x


def _side_by_side(step: Step) -> tuple[str | Conv, ...]:
  return step if isinstance(step, tuple) else (step,)


def _name(stage: str, conv: Conv) -> str:
  return f'{stage}.{conv.name}' if conv.name else stage


def _run(
  params: Params, stage: str, step: str | Conv, x: Float[Array, 'b h w c']
) -> Float[Array, 'b _ _ _']:
  """A pool, or a convolution with its bias and a ReLU."""
  if isinstance(step, str):
    return POOLS[step](x)
  layer = params[_name(stage, step)]
  x = jax.lax.conv_general_dilated(
    x,
    layer['kernel'].astype(x.dtype),
    window_strides=(step.stride, step.stride),
    padding=step.padding,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=PRECISION,
  )
  return nn.relu(x + layer['bias'].astype(x.dtype).reshape(1, 1, 1, -1))


# First digits of the SHA-256 of the published file, which its name has too.
DIGEST = '6726825d'
PUBLISHED = contract.Published(
  hub='',
  files=('pt_inception-2015-12-05-6726825d.pth',),
  licence='Apache-2.0',
  millions=23.8,
  use='Frechet distance',
  url=(
    'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
    'pt_inception-2015-12-05-6726825d.pth'
  ),
)

_EPSILON = 1e-3
_NORM = ('weight', 'bias', 'running_mean', 'running_var')
# Counters of training steps, and a classifier for training alone.
_UNUSED = ('*.num_batches_tracked', 'AuxLogits.*')


def fold(
  reader: weight_reader.Reader, name: str, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
  """A convolution with its batch norm folded in.

  Args:
    reader: of the file.
    name: name of the layer.
    shape: shape of its kernel, HWIO.

  Returns:
    'kernel' (HWIO) and 'bias', float32.
  """
  height, width, inputs, outputs = shape
  kernel = reader.take(f'{name}.conv.weight', outputs, inputs, height, width)
  gain, bias, mean, variance = (
    reader.take(f'{name}.bn.{part}', outputs).astype(np.float64)
    for part in _NORM
  )
  gain = gain / np.sqrt(variance + _EPSILON)
  return {
    'kernel': (kernel.transpose(2, 3, 1, 0) * gain).astype(np.float32),
    'bias': (bias - mean * gain).astype(np.float32),
  }


def assemble(reader: weight_reader.Reader) -> Params:
  """Parameters of `Inception` from the arrays of a state dict."""
  params = {name: fold(reader, name, s) for name, s in kernels().items()}
  params['fc'] = reader.linear('fc', POOLED_WIDTH, CLASSES)
  return params


@jax.jit
def init(key: PRNGKeyArray) -> Params:
  """Random parameters that keep activations of order 1."""
  shapes: dict[str, tuple[int, ...]] = dict(kernels())
  shapes['fc'] = (POOLED_WIDTH, CLASSES)
  sizes = [math.prod(shape) for shape in shapes.values()]
  # One draw for all: a draw for each of 95 shapes compiles for a minute.
  parts = jnp.split(
    jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1]
  )
  params = {}
  for numbers, (name, shape) in zip(parts, shapes.items(), strict=True):
    gain = math.sqrt(2 / math.prod(shape[:-1]))
    params[name] = {
      'kernel': gain * numbers.reshape(shape),
      'bias': jnp.zeros(shape[-1]),
    }
  return params


SIZE = 299
GRID = 8
# Width of the map after a stage to the stage: the usual choices of features.
POOLED_AFTER = {
  64: 'MaxPool_1',
  192: 'MaxPool_2',
  768: 'Mixed_6e',
  2048: 'Mixed_7c',
}
# The graph's `mixed_6/conv`: the first branch of this stage, so the first of
# its channels. sFID takes seven of them, 7 x 17 x 17 = 2023 numbers.
SPATIAL_AFTER, SPATIAL_CHANNELS = 'Mixed_6d', 7


@flax.struct.dataclass
class Measured:
  """Activations that scores read; unread ones cost nothing under jit.

  Attributes:
    pooled: width (64, 192, 768, 2048) to the spatial mean [b, width].
    spatial: sFID's features, in the order row, column, channel.
    logits_unbiased: without the last bias, as the inception score takes them.
    logits: with it.
    last: the map that pool_3 averages.
    activations: name of each stage to its map.
  """

  pooled: dict[int, Float[Array, 'b _']]
  spatial: Float[Array, 'b 2023']
  logits_unbiased: Float[Array, 'b 1008']
  logits: Float[Array, 'b 1008']
  last: Float[Array, 'b 8 8 2048']
  activations: dict[str, Float[Array, 'b _ _ _']]


@dataclasses.dataclass(frozen=True)
class Resize:
  """The way of pixels p of 0..255 to the first layer.

  Attributes:
    centre: pixel i lies at i + centre.
    shift: c of (p - c) / s.
    scale: s.
  """

  centre: float
  shift: float
  scale: float


RESIZES = {
  'tf1': Resize(0.0, 128.0, 128.0),
  'half_pixel': Resize(0.5, 127.5, 127.5),
}


def resize_matrix(old: int, centre: float) -> Float[np.ndarray, '299 old']:
  """The bilinear map of a row or column of `old` pixels to SIZE of them."""
  # In float32 as the references: rounding of positions is part of the protocol
  # (at 500 pixels up to 0.008 of 255 levels).
  step, start = np.float32(old / SIZE), np.float32(centre)
  position = (np.arange(SIZE, dtype=np.float32) + start) * step - start
  position = np.maximum(position, 0)
  lower = np.floor(position).astype(int)
  upper = np.minimum(lower + 1, old - 1)
  matrix, rows = np.zeros((SIZE, old), np.float32), np.arange(SIZE)
  matrix[rows, lower] = 1 - (position - lower)
  matrix[rows, upper] += position - lower
  return matrix


@dataclasses.dataclass(frozen=True, eq=False)
class Inception:
  """Inception-v3 with 1008 classes, on images of any size.

  Patches are its last 8 x 8 map, `cls` is pool_3, the 2048 numbers that FID
  compares. FID is defined on 8-bit pixels, but nothing is rounded here, so that
  gradients pass: quantise first, and hand in p / 127.5 - 1.

  Attributes:
    resize: 'tf1' is the protocol of ADM and torch-fidelity: no half-pixel
      centres, (p - 128) / 128. 'half_pixel' is that of pytorch-fid: half-pixel
      centres, p / 127.5 - 1. Neither antialiases, and their FIDs differ.
    name: name in reports.
    params: name of a layer to its float32 'kernel' and 'bias'; None until they
      are loaded.
  """

  resize: str = 'tf1'
  name: str = 'inception'
  params: Any = None

  def __post_init__(self) -> None:
    """Raises UserError for a `resize` that RESIZES lacks."""
    if self.resize not in RESIZES:
      raise errors.UserError(
        f'unknown resize {self.resize!r} of {self.name}; choose one of '
        f'{", ".join(RESIZES)}'
      )

  def __call__(
    self, params: Params, images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Patches [b, 64, 2048] and pool_3 [b, 2048] of images in [-1, 1]."""
    measured = self.measure(params, images)
    b, rows, columns, d = measured.last.shape
    patches = measured.last.reshape(b, rows * columns, d)
    return contract.Features(patches, measured.pooled[d])

  @property
  def dim(self) -> int:
    """Width of a patch vector, and of `cls`."""
    return POOLED_WIDTH

  @property
  def published(self) -> contract.Published:
    """Place of the weights."""
    return PUBLISHED

  @property
  def shape_key(self) -> dict[str, Any]:
    """Parameters depend on the file alone."""
    return {}

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches, whatever the size of the images."""
    del image_size
    return GRID, GRID

  def prepare(
    self, images: Float[Array, 'b h w 3']
  ) -> Float[Array, 'b 299 299 3']:
    """Input of the first layer for images in [-1, 1]."""
    how = RESIZES[self.resize]
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    pixels = (x + 1) * 127.5
    rows, columns = (
      jnp.asarray(resize_matrix(side, how.centre), x.dtype)
      for side in x.shape[1:3]
    )
    for equation, matrix in (
      ('ih,bhwc->biwc', rows),
      ('jw,biwc->bijc', columns),
    ):
      pixels = jnp.einsum(equation, matrix, pixels, precision=PRECISION)
    return (pixels - how.shift) / how.scale

  def measure(
    self, params: Params, images: Float[Array, 'b h w 3']
  ) -> Measured:
    """All that scores read, for images in [-1, 1]."""
    maps = dict(run_all(params, self.prepare(images)))
    pooled = {
      width: maps[stage].mean(axis=(1, 2))
      for width, stage in POOLED_AFTER.items()
    }
    last = maps[POOLED_AFTER[self.dim]]
    spatial = maps[SPATIAL_AFTER][..., :SPATIAL_CHANNELS]
    unbiased = jnp.einsum(
      'bd,dv->bv',
      pooled[self.dim],
      params['fc']['kernel'].astype(last.dtype),
      precision=PRECISION,
    )
    return Measured(
      pooled=pooled,
      spatial=spatial.reshape(len(spatial), -1),
      logits_unbiased=unbiased,
      logits=unbiased + params['fc']['bias'].astype(last.dtype)[None],
      last=last,
      activations=maps,
    )

  def init(self, key: PRNGKeyArray) -> Params:
    """Random parameters that keep activations of order 1; traceable."""
    return init(key)

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> Params:
    """Parameters from the published state dict; WeightsError for others."""
    reader = weight_reader.Reader(arrays)
    params = assemble(reader)
    reader.check('inception', source, _UNUSED)
    return params
