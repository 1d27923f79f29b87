"""A network of one matrix, and what a store makes of it."""

import pathlib

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from selfboottok_jax import errors
from selfboottok_jax.pretrained import contract, store, weight_reader
from tests.pretrained import fake_hub

PUBLIC = contract.Published('org/net', ('model.bin',), 'MIT', 1.0, 'test')


def isolate(folder, monkeypatch) -> pathlib.Path:
  """An empty cache in `folder`, and a hub that nobody reaches."""
  cache = folder / 'cache'
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(cache))
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  return cache


class Reader:
  """Reads one matrix, and counts how often."""

  def __init__(self):
    self.calls = 0

  def __call__(self, arrays, source):
    self.calls += 1
    reader = weight_reader.Reader(arrays)
    reader.take('w', 2, 3)
    reader.check('net', source, ['extra'])
    return {'layer': {'kernel': arrays['w'].T}}


def write(path, value=1.0, **more):
  """Saves the matrix, all of one value, in 16 bits."""
  arrays = {'w': np.full((2, 3), value, np.float16), **more}
  path.parent.mkdir(parents=True, exist_ok=True)
  safetensors_numpy.save_file(arrays, path)
  return str(path)


def load(source, read, shape_key=None, published=PUBLIC, name='net'):
  return store.load(name, source, published, shape_key or {}, read)


def value(params):
  assert params.keys() == {'layer'}
  kernel = params['layer']['kernel']
  assert (kernel.dtype, kernel.shape) == (np.float32, (3, 2))
  assert (kernel == kernel[0, 0]).all()
  return kernel[0, 0]


def message(source, read, **arguments):
  with pytest.raises(errors.WeightsError) as caught:
    load(source, read, **arguments)
  text = str(caught.value)
  assert '\n' not in text
  return text


def snapshot(folder):
  return {
    path.relative_to(folder): path.is_file() and path.read_bytes()
    for path in folder.rglob('*')
  }


def entries_of(cache):
  return sorted(cache.glob('weights/net-*'))
