"""Random weight files of the right shape, and where the real ones are."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.pretrained import lpips, weight_reader

SHARED = pathlib.Path(__file__).parents[2] / '..' / 'shared'


def real(file: str) -> str:
  """Path of a pretrained network in WEIGHTS; skips where there is none."""
  folder = pathlib.Path(os.environ.get('WEIGHTS') or SHARED / 'weights')
  path = folder / file
  if not path.exists():
    assert 'WEIGHTS' not in os.environ, f'no {file} in WEIGHTS={folder}'
    pytest.skip(f'no {file} in {folder}; set WEIGHTS to the folder that has it')
  return str(path)


def wanted(assemble, *arguments):
  """Name to shape of all arrays that an import asks for."""
  reader = weight_reader.Reader({})
  assemble(reader, *arguments)
  return reader.wanted


def lpips_of(arrays, backbone, name):
  """LPIPS of the state dict of the `lpips` package, or of taming's."""
  network = lpips.Lpips(backbone, name)
  params = network.read(arrays, 'the lpips state dict')
  return dataclasses.replace(network, params=jax.tree.map(jnp.asarray, params))


def random_lpips(shapes, seed=0, dtype=np.float16):
  """Arrays with the shapes of an LPIPS file, activations of order 1."""
  rng = np.random.default_rng(seed)
  arrays = {}
  for name, shape in shapes.items():
    if name.startswith('lpips.'):
      arrays[name] = rng.uniform(0, 1, shape).astype(np.float32)
    else:
      scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.05
      arrays[name] = (scale * rng.standard_normal(shape)).astype(dtype)
  return arrays


def random_mobilenet(shapes, seed=0):
  """Arrays with the shapes of a MobileNetV2 file, activations of order 1."""
  rng = np.random.default_rng(seed)
  arrays = {}
  for name, shape in shapes.items():
    if name.endswith('_w_int8'):
      arrays[name] = rng.integers(-127, 128, shape, dtype=np.int8)
    elif name.endswith('_scale'):
      kernel = shapes[name.replace('_scale', '_w_int8')]
      gain = np.sqrt(2 / np.prod(kernel[:3])) / 73
      arrays[name] = np.full(shape, gain, np.float32)
    else:
      arrays[name] = (0.05 * rng.standard_normal(shape)).astype(np.float32)
  return arrays


def save(path, arrays) -> str:
  np.savez(path, **arrays)
  return str(path)


def as_published(arrays, unused):
  """An LPIPS file's arrays as two: torchvision's backbone, and the heads."""
  backbone = {k: v for k, v in arrays.items() if not k.startswith('lpips.')}
  backbone |= {name: np.zeros(1, np.float32) for name in unused}
  heads = {
    f'{name.removeprefix("lpips.")}.model.1.weight': array.reshape(1, -1, 1, 1)
    for name, array in arrays.items()
    if name.startswith('lpips.')
  }
  return backbone, heads


def as_package(arrays):
  """An LPIPS file's arrays as the `lpips` package has them in one module."""
  backbone, heads = as_published(arrays, ())
  stages = {
    f'net.slice{1 + i // 5}.{name.removeprefix("features.")}': array
    for i, (name, array) in enumerate(backbone.items())
  }
  again = {f'lins.{name[3:]}': array for name, array in heads.items()}
  constants = {
    f'scaling_layer.{name}': np.ones((1, 3, 1, 1), np.float32)
    for name in ('shift', 'scale')
  }
  return stages | heads | again | constants
