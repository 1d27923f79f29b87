import zipfile

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import (
  convert,
  lpips,
  lpips_backbones,
  mobilenet,
)
from tests.pretrained import weights

WANTED = {'a.weight': (2, 3), 'a.bias': (3,), 'b': (4,)}


def _arrays():
  return {k: np.ones(s, np.float32) for k, s in WANTED.items()}


def _message(path):
  with pytest.raises(errors.WeightsError) as caught:
    convert.read_npz(str(path), WANTED, 'toy', unused=['head'])
  message = str(caught.value)
  assert '\n' not in message
  assert str(path) in message
  return message


def test_reads_what_is_wanted_and_leaves_the_unused(tmp_path):
  path = weights.save(tmp_path / 'a.npz', _arrays() | {'head': np.zeros(9)})
  arrays = convert.read_npz(path, WANTED, 'toy', unused=['head'])
  assert {k: v.shape for k, v in arrays.items()} == WANTED


def test_one_line_lists_all_that_does_not_fit(tmp_path):
  arrays = _arrays() | {'c': np.zeros(1), 'a.weight': np.zeros((3, 2))}
  arrays['b'] = np.array([1, 2, np.nan, 4])
  del arrays['a.bias']
  message = _message(weights.save(tmp_path / 'a.npz', arrays))
  for part in (
    '1 missing: a.bias',
    '1 unexpected: c',
    'a.weight is (3, 2), wanted (2, 3)',
    '1 not finite numbers: b',
  ):
    assert part in message


def test_damaged_files(tmp_path):
  good = tmp_path / 'good.npz'
  weights.save(good, _arrays())
  data = good.read_bytes()
  cases = {
    'empty.npz': b'',
    'text.npz': b'hello, world',
    'cut.npz': data[: len(data) // 2],
    'tail.npz': data[:-5],
    'head.npz': data[20:],
  }
  flipped = bytearray(data)
  flipped[data.index(b'a.weight') + 150] ^= 0x10
  cases['flipped.npz'] = bytes(flipped)
  # A header that asks for petabytes must not get them.
  huge = b'(99999999999999,), }'
  where = data.index(b'(4,), }')
  cases['huge.npz'] = data[:where] + huge + data[where + len(huge) :]
  for name, content in cases.items():
    (tmp_path / name).write_bytes(content)
    assert 'not an intact .npz' in _message(tmp_path / name), name
  assert 'no weight file' in _message(tmp_path / 'none.npz')
  assert 'no weight file' in _message(tmp_path)


def test_other_kinds_of_file(tmp_path):
  single = tmp_path / 'single.npz'
  with open(single, 'wb') as file:
    np.save(file, np.zeros(3))
  assert 'not an intact .npz' in _message(single)
  with zipfile.ZipFile(tmp_path / 'zip.npz', 'w') as archive:
    archive.writestr('a.weight', 'not an array')
  _message(tmp_path / 'zip.npz')


def test_pickles_are_refused(tmp_path):
  path = tmp_path / 'pickle.npz'
  np.savez(path, **_arrays(), c=np.array([{}], dtype=object))
  assert 'allow_pickle' in _message(path)


def test_networks_tell_their_files_apart(tmp_path):
  a = weights.save(
    tmp_path / 'a.npz',
    weights.random_lpips(lpips.shapes(lpips_backbones.squeeze())),
  )
  b = weights.save(
    tmp_path / 'b.npz', weights.random_mobilenet(mobilenet.shapes())
  )
  with pytest.raises(errors.WeightsError, match='holds another network'):
    mobilenet.load_mobilenet(a)
  with pytest.raises(errors.WeightsError, match='holds another network'):
    lpips.load_squeeze(b)
