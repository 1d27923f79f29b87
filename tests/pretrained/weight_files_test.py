"""Formats that need no torch; torch files are tested in tests/parity."""

import os
import pickle
import struct
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from selfboottok_jax import errors
from selfboottok_jax.pretrained import weight_files
from tests.pretrained import weights

ARRAYS = {
  'a.weight': np.arange(6, dtype=np.float32).reshape(2, 3),
  'a.half': np.ones((2, 2), np.float16),
  'count': np.array(3, np.int64),
}


class Evil:
  """A pickle of it makes a file where it is opened."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


def _safetensors(path, arrays=ARRAYS):
  safetensors_numpy.save_file(arrays, path)
  return path


def _npz(path):
  weights.save(path, ARRAYS)
  return path


FORMATS = {'safetensors': _safetensors, 'npz': _npz}


def _message(path):
  with pytest.raises(errors.WeightsError) as caught:
    weight_files.read(path)
  message = str(caught.value)
  assert '\n' not in message
  assert str(path) in message
  return message


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('suffix', weight_files.SUFFIXES)
def test_content_decides_and_not_the_name(tmp_path, kind, suffix):
  made = FORMATS[kind](tmp_path / f'made.{kind}')
  path = made.rename(tmp_path / f'weights{suffix}')
  arrays = weight_files.read(str(path))
  assert arrays.keys() == ARRAYS.keys()
  for name, array in ARRAYS.items():
    assert arrays[name].dtype == array.dtype
    np.testing.assert_array_equal(arrays[name], array)


def test_bfloat16_becomes_float32(tmp_path):
  values = np.array([1.5, -2, 3e38], ml_dtypes.bfloat16)
  header = b'{"x":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]}}'
  path = tmp_path / 'b.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header + values.tobytes())
  read = weight_files.read(path)['x']
  assert read.dtype == np.float32
  np.testing.assert_array_equal(read, values.astype(np.float32))


def test_numbers_of_eight_bits_are_named(tmp_path):
  header = b'{"x":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}}'
  path = tmp_path / 'b.safetensors'
  path.write_bytes(struct.pack('<Q', len(header)) + header + b'\0\0')
  assert 'x is F8_E4M3' in _message(path)


@pytest.mark.parametrize('kind', FORMATS)
def test_cut_files(tmp_path, kind):
  data = FORMATS[kind](tmp_path / f'whole.{kind}').read_bytes()
  path = tmp_path / 'cut'
  for length in (1, 7, 9, 60, len(data) // 2, len(data) - 1):
    path.write_bytes(data[:length])
    message = _message(path)
    assert 'not an intact' in message or 'holds no weights' in message
  path.write_bytes(data[len(data) // 3 :])
  _message(path)
  path.write_bytes(data + b'more')
  if kind == 'safetensors':
    assert 'not an intact safetensors' in _message(path)


def test_checksums_of_npz(tmp_path):
  data = bytearray(_npz(tmp_path / 'a.npz').read_bytes())
  path = tmp_path / 'damaged.npz'
  flipped = data.copy()
  flipped[data.index(b'a.weight') + 150] ^= 0x10
  path.write_bytes(flipped)
  assert 'bad checksum of a.weight' in _message(path)
  # A header that asks for petabytes must not get them.
  huge = b'(99999999999999,), }'
  where = data.index(b'(2, 3), }')
  path.write_bytes(data[:where] + huge + data[where + len(huge) :])
  assert 'bad checksum' in _message(path)


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    (b'', 'it is empty'),
    (b'hello, world', 'not known'),
    (b'\x89PNG\r\n\x1a\n' + bytes(99), 'PNG'),
    (b'<!DOCTYPE html><html>', 'web page'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    (b'\xff' * 8 + b'{}', 'not known'),
  ],
)
def test_other_kinds_of_file(tmp_path, content, said):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(content)
  assert said in _message(path)


def test_other_kinds_of_numpy_and_zip(tmp_path):
  single = tmp_path / 'single.npz'
  with single.open('wb') as file:
    np.save(file, np.zeros(3))
  assert 'a single array' in _message(single)
  for member, said in (('a.txt', 'other files'), ('a.npy', 'more than arrays')):
    path = tmp_path / 'zip.npz'
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr(member, 'not an array')
    assert said in _message(path)


def test_no_such_file(tmp_path):
  assert 'no weight file' in _message(tmp_path / 'none.npz')
  assert 'no weight file' in _message(tmp_path)


def test_objects_in_npz_are_refused_and_no_code_runs(tmp_path):
  path, trace = tmp_path / 'pickle.npz', tmp_path / 'trace'
  np.savez(path, **ARRAYS, c=np.array([Evil(trace)], dtype=object))
  assert 'allow_pickle' in _message(path)
  assert not trace.exists()


def test_plain_pickles_run_no_code(tmp_path, monkeypatch):
  """Nor would they without torch, which tells what it met itself."""
  trace = tmp_path / 'trace'
  for protocol in (2, 5):
    path = tmp_path / f'{protocol}.ckpt'
    path.write_bytes(pickle.dumps({'a': Evil(trace)}, protocol))
    with monkeypatch.context() as patch:
      patch.setitem(sys.modules, 'torch', None)
      assert 'pip install torch' in _message(path)
  assert not trace.exists()
  # The pickle does what it says, so a file there would have been seen.
  pickle.loads(pickle.dumps(Evil(trace)))
  assert trace.exists()


def test_several_files_are_taken_together(tmp_path):
  one = _safetensors(tmp_path / 'one', {'a': np.zeros(2, np.float32)})
  two = _safetensors(tmp_path / 'two', {'b': np.ones(3, np.float32)})
  both = weight_files.read_all({'one': one, 'two': two})
  assert {name: array.shape for name, array in both.items()} == {
    'a': (2,),
    'b': (3,),
  }
  with pytest.raises(errors.WeightsError, match=r'has too \(a\)'):
    weight_files.read_all({'one': one, 'again': one})


def test_metadata_of_safetensors_alone(tmp_path):
  path = tmp_path / 'a'
  safetensors_numpy.save_file(dict(ARRAYS), path, {'made by': 'hand'})
  assert weight_files.metadata(path) == {'made by': 'hand'}
  assert weight_files.metadata(_safetensors(tmp_path / 'b')) == {}
  assert weight_files.metadata(_npz(tmp_path / 'c.npz')) == {}
  (tmp_path / 'd').write_bytes(path.read_bytes()[:30])
  assert weight_files.metadata(tmp_path / 'd') == {}


A, B, C = ({'w': np.full(2, value)} for value in (1, 2, 3))


def _take(value):
  return weight_files.state_dict(value, 'some.ckpt')


def _state_message(value):
  with pytest.raises(errors.WeightsError) as caught:
    _take(value)
  assert 'some.ckpt' in str(caught.value)
  return str(caught.value)


def test_a_plain_state_dict_without_its_other_entries():
  assert _take({**A, 'epoch': 3, 'name': 'x', 'options': {'lr': 1}}) == A


@pytest.mark.parametrize(
  ('value', 'wanted'),
  [
    ({'state_dict': A, 'epoch': 3}, A),
    ({'model': A, 'ema': B, 'optimizer': {'state': {0: C}}}, B),
    ({'model': A, 'state_dict': B}, B),
    ({'student': A, 'teacher': B}, B),
    ({'encoder': A, 'target_encoder': B}, B),
    ({'ema': {'module': B, 'step': 3}, 'model': A}, B),
    ({'anything': A, 'epoch': 3}, A),
    # No arrays under the name that would come first.
    ({'ema': {'decay': 0.999}, 'model': A}, A),
    ({'ema': None, 'model': A}, A),
  ],
)
def test_the_state_dict_of_a_checkpoint(value, wanted):
  assert _take(value) == wanted


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    ({'generator': A, 'discriminator': B}, 'generator, discriminator'),
    ({'epoch': 3}, 'no arrays'),
    ([1, 2], 'no arrays'),
    ({}, 'no arrays'),
  ],
)
def test_nothing_or_too_much_to_choose_from(value, said):
  assert said in _state_message(value)


def test_wrappers_of_training_are_removed():
  wrapped = {'module._orig_mod.module.w': A['w'], 'module._orig_mod.b': B['w']}
  assert _take({'model': wrapped}).keys() == {'module.w', 'b'}
  mixed = {'module.w': A['w'], 'b': B['w']}
  assert _take(mixed).keys() == mixed.keys()


def _archive(path):
  """A zip that has what makes it torch's."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', b'\x80\x02}.')
  return path


def test_without_torch_it_says_how_to_convert(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = _archive(tmp_path / 'a.pth')
  with pytest.raises(errors.WeightsError) as caught:
    weight_files.read_torch(path)
  for part in (str(path), 'pip install torch', 'python -m launch.convert'):
    assert part in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_torch_that_could_be_tricked_is_not_used(tmp_path, monkeypatch):
  old = types.SimpleNamespace(__version__='2.5.1+cpu')
  monkeypatch.setitem(sys.modules, 'torch', old)
  with pytest.raises(errors.WeightsError, match=r'torch 2\.5\.1.*torch>=2\.6'):
    weight_files.read_torch(_archive(tmp_path / 'a.pth'))
