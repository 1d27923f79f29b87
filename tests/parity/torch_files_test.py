"""Files that torch writes, read by torch with `weights_only` alone."""

import argparse
import pickle
import random
import types

import numpy as np
import pytest
import torch

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import lpips, weight_files
from tests.pretrained import weight_files_test, weights

OLD = {'zip': False, 'old format': True}
both_formats = pytest.mark.parametrize('old', OLD.values(), ids=OLD)


def _save(path, value, old):
  torch.save(value, path, _use_new_zipfile_serialization=not old)
  return path


def _message(path):
  with pytest.raises(errors.WeightsError) as caught:
    weight_files.read(path)
  message = str(caught.value)
  assert '\n' not in message
  assert str(path) in message
  assert 'weights_only' not in message
  return message


@both_formats
def test_arrays_of_every_layout(tmp_path, old):
  base = torch.arange(12.0).reshape(3, 4)
  value = {
    'module.transposed': torch.nn.Parameter(base.T),
    'module.row': base[1],
    'module.half': base.half(),
    'module.bfloat16': base.bfloat16(),
    'module.count': torch.tensor(3),
  }
  path = _save(tmp_path / 'weights.npz', {'state_dict': value, 'e': 1}, old)
  arrays = weight_files.read(path)
  for name, tensor in value.items():
    array = arrays[name.removeprefix('module.')]
    wanted = tensor.detach()
    if tensor.dtype == torch.bfloat16:
      assert array.dtype == np.float32
      wanted = wanted.float()
    assert array.dtype == wanted.numpy().dtype
    np.testing.assert_array_equal(array, wanted.numpy())


@both_formats
def test_code_is_not_run(tmp_path, old):
  trace = tmp_path / 'trace'
  value = {'a': torch.ones(2), 'b': weight_files_test.Evil(trace)}
  path = _save(tmp_path / 'evil.pth', value, old)
  assert 'holds more than arrays (posix.mkdir)' in _message(path)
  assert not trace.exists()
  # It would have been run by a reader that is less careful.
  torch.load(path, weights_only=False)
  assert trace.exists()


def test_code_in_a_plain_pickle_is_not_run(tmp_path):
  trace, path = tmp_path / 'trace', tmp_path / 'a.bin'
  for protocol in (2, 4, 5):
    path.write_bytes(pickle.dumps(weight_files_test.Evil(trace), protocol))
    _message(path)
    assert not trace.exists()


@both_formats
@pytest.mark.parametrize(
  ('extra', 'said'),
  [
    (types.SimpleNamespace(lr=1), 'types.SimpleNamespace'),
    (np.float32(3), 'multiarray.scalar'),
    (torch.nn.Linear(2, 2), 'torch.nn.modules.linear.Linear'),
  ],
)
def test_objects_beside_the_arrays_are_named(tmp_path, old, extra, said):
  value = {'model': {'a': torch.ones(2)}, 'args': extra}
  message = _message(_save(tmp_path / 'a.pt', value, old))
  assert said in message
  assert 'safetensors.torch.save_file' in message


@both_formats
def test_settings_beside_the_arrays_are_left_there(tmp_path, old):
  """Checkpoints in the layouts that REPA and REG trainings save."""
  wanted = torch.arange(4.0)
  value = {
    'model': {'a': torch.zeros(4)},
    'ema': {'a': wanted},
    'args': argparse.Namespace(lr=1e-4, name='x', sizes=[1, 2], resume=None),
    'steps': 3,
  }
  arrays = weight_files.read(_save(tmp_path / 'a.pt', value, old))
  np.testing.assert_array_equal(arrays['a'], wanted.numpy())
  assert arrays.keys() == {'a'}
  # Only while a file is read: whoever else uses torch has not asked for it.
  assert argparse.Namespace not in torch.serialization.get_safe_globals()


@both_formats
def test_code_in_settings_is_not_run(tmp_path, old):
  trace = tmp_path / 'trace'
  settings = argparse.Namespace(evil=weight_files_test.Evil(trace))
  value = {'ema': {'a': torch.ones(2)}, 'args': settings}
  path = _save(tmp_path / 'evil.pth', value, old)
  assert 'holds more than arrays (posix.mkdir)' in _message(path)
  assert not trace.exists()


@both_formats
def test_cut_and_changed_files(tmp_path, old):
  wanted = {f'layer{i}': torch.full((20, 5), float(i)) for i in range(4)}
  data = _save(tmp_path / 'whole.pt', wanted, old).read_bytes()
  path, rng = tmp_path / 'damaged.pt', random.Random(0)
  lengths = [0, 1, 2, 30, 300, len(data) - 1]
  lengths += [rng.randrange(len(data)) for _ in range(20)]
  for length in lengths:
    path.write_bytes(data[:length])
    _message(path)
  for _ in range(20):
    where = rng.randrange(1, len(data))
    path.write_bytes(data[:where] + b'?' + data[where:])
    _message(path)


def test_flipped_bits_of_a_zip(tmp_path):
  wanted = torch.arange(100.0)
  path = _save(tmp_path / 'a.pt', {'a': wanted}, False)
  data = bytearray(path.read_bytes())
  data[data.index(wanted.numpy().tobytes()) + 5] ^= 1
  path.write_bytes(data)
  assert 'bad checksum' in _message(path)


def test_a_zip_without_checksums_is_read(tmp_path):
  torch.serialization.set_crc32_options(False)
  try:
    path = _save(tmp_path / 'a.pt', {'a': torch.ones(3)}, False)
  finally:
    torch.serialization.set_crc32_options(True)
  np.testing.assert_array_equal(weight_files.read(path)['a'], np.ones(3))


@both_formats
@pytest.mark.parametrize('name', lpips.BACKBONES)
def test_lpips_as_it_is_published(tmp_path, name, old):
  """torchvision's backbone with its classifier, and the heads of `lpips`."""
  backbone = lpips.BACKBONES[name]()
  arrays = weights.random_lpips(
    weights.wanted(lpips.assemble, backbone), dtype=np.float32
  )
  path = weights.save(tmp_path / 'ours.npz', arrays)
  ours = pretrained.load_perceptual(f'lpips_{name}:{path}')
  folder = tmp_path / 'published'
  folder.mkdir()
  parts = weights.as_published(arrays, backbone.unused)
  for file, part in zip(lpips.PUBLISHED[name].files, parts, strict=True):
    tensors = {key: torch.from_numpy(array) for key, array in part.items()}
    _save(folder / file, tensors, old)
  theirs = pretrained.load_perceptual(f'lpips_{name}:{folder}')
  assert theirs.params.keys() == ours.params.keys()
  for key, array in ours.params.items():
    np.testing.assert_array_equal(theirs.params[key], array)
