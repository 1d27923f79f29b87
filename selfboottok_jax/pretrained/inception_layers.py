"""The layers of Inception-v3 as TensorFlow's graph of 2015-12-05 has them.

Szegedy et al., "Rethinking the Inception Architecture for Computer Vision",
2016. That graph's pools differ from torchvision's: an average skips what it
pads, and the last block takes a maximum where the others average.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


def _alone(*arguments) -> Stage:
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


def _run(params, stage, step, x):
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
