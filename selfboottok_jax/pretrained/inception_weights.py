"""Parameters of `inception`: from the published state dict, or random.

Names are pytorch-fid's and torch-fidelity's, which are torchvision's.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from selfboottok_jax.pretrained import convert, inception_layers, published

Arrays = Mapping[str, np.ndarray]

PUBLISHED = published.Published(
  hub='',
  files=('pt_inception-2015-12-05-6726825d.pth',),
  licence='Apache-2.0',
  millions=23.8,
  use='FID, sFID, inception score, precision and recall',
  url=(
    'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/'
    'pt_inception-2015-12-05-6726825d.pth'
  ),
)

_EPSILON = 1e-3
_NORM = ('weight', 'bias', 'running_mean', 'running_var')


def shapes() -> dict[str, tuple[int, ...]]:
  """Name to shape of every array of the file that is used, kernels OIHW."""
  both = {}
  for name, (
    height,
    width,
    inputs,
    outputs,
  ) in inception_layers.kernels().items():
    both[f'{name}.conv.weight'] = (outputs, inputs, height, width)
    both |= {f'{name}.bn.{part}': (outputs,) for part in _NORM}
  classes = inception_layers.CLASSES
  both['fc.weight'] = (classes, inception_layers.POOLED_WIDTH)
  both['fc.bias'] = (classes,)
  return both


def fold(arrays: Arrays, layer: str) -> dict[str, np.ndarray]:
  """Kernel (HWIO) and bias of a convolution with its batch norm in them."""
  gain, bias, mean, variance = (
    np.asarray(arrays[f'{layer}.bn.{part}'], np.float64) for part in _NORM
  )
  gain = gain / np.sqrt(variance + _EPSILON)
  kernel = arrays[f'{layer}.conv.weight'].transpose(2, 3, 1, 0) * gain
  return {
    'kernel': kernel.astype(np.float32),
    'bias': (bias - mean * gain).astype(np.float32),
  }


def read(arrays: Arrays, source: str) -> inception_layers.Params:
  """Parameters of `inception.Inception` from a state dict.

  Args:
    arrays: by the names of the file.
    source: names the file in errors.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite.
  """
  unused = [
    name
    for name in arrays
    # A counter of training steps, and a classifier for training alone.
    if name.endswith('.num_batches_tracked') or name.startswith('AuxLogits.')
  ]
  convert.check(arrays, shapes(), 'inception', source, unused=unused)
  params = {name: fold(arrays, name) for name in inception_layers.kernels()}
  params['fc'] = {
    'kernel': np.asarray(arrays['fc.weight'], np.float32).T,
    'bias': np.asarray(arrays['fc.bias'], np.float32),
  }
  return params


@jax.jit
def init(key: PRNGKeyArray) -> inception_layers.Params:
  """Random parameters that keep activations of order 1."""
  shapes: dict[str, tuple[int, ...]] = dict(inception_layers.kernels())
  shapes['fc'] = (inception_layers.POOLED_WIDTH, inception_layers.CLASSES)
  sizes = [math.prod(shape) for shape in shapes.values()]
  # One draw for all: a draw for each of 95 shapes compiles for a minute.
  parts = jnp.split(jax.random.normal(key, sum(sizes)), np.cumsum(sizes)[:-1])
  params = {}
  for numbers, (name, shape) in zip(parts, shapes.items(), strict=True):
    gain = math.sqrt(2 / math.prod(shape[:-1]))
    params[name] = {
      'kernel': gain * numbers.reshape(shape),
      'bias': jnp.zeros(shape[-1]),
    }
  return params
