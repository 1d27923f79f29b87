import json
import os
import stat
import time

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from selfboottok_jax import errors
from selfboottok_jax.pretrained import entries

RECORD = {'network': 'net', 'files': {'a.pth': '0' * 64}}


def _flat(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'block/kernel': rng.normal(size=(3, 4)).astype(np.float32),
    'features.0.bias': rng.normal(size=3).astype(np.float32),
  }


def _assert_same(a, b):
  assert a.keys() == b.keys()
  for name, array in a.items():
    np.testing.assert_array_equal(array, b[name])


def _tree(folder):
  return sorted(path.name for path in folder.rglob('*'))


def test_flatten_and_back():
  params = {
    'a': {'b': {'c': np.ones(2)}, 'd': np.arange(3)},
    'e.f': np.zeros(1),
  }
  flat = entries.flatten(params)
  assert list(flat) == ['a/b/c', 'a/d', 'e.f']
  assert {array.dtype for array in flat.values()} == {np.dtype(np.float32)}
  assert entries.unflatten(flat).keys() == params.keys()
  _assert_same(entries.flatten(entries.unflatten(flat)), flat)


@pytest.mark.parametrize('key', ['a/b', 3])
def test_keys_that_could_not_be_told_apart(key):
  with pytest.raises(ValueError, match='wanted no'):
    entries.flatten({'x': {key: np.ones(1)}})


def test_leaves_are_own_copies_as_they_will_be_written(tmp_path):
  source = np.arange(6, dtype=np.float32).reshape(2, 3)
  flat = entries.flatten({'a': source.T, 'b': source[0], 'c': source[0, 0]})
  assert not any(np.shares_memory(a, source) for a in flat.values())
  entries.write(tmp_path / 'net-1', flat, RECORD)
  read = entries.read(tmp_path / 'net-1')
  np.testing.assert_array_equal(read['a'], source.T)
  assert read['c'].shape == ()


def test_an_entry_and_its_record(tmp_path):
  folder = tmp_path / 'weights' / 'net-1'
  assert entries.read(folder) is None
  entries.write(folder, _flat(), RECORD)
  _assert_same(entries.read(folder), _flat())
  assert _tree(folder) == [entries.PARAMS, entries.RECORD]
  assert _tree(tmp_path / 'weights') == ['net-1', *_tree(folder)]
  record = json.loads((folder / entries.RECORD).read_text())
  digest = entries.sha256(folder / entries.PARAMS)
  assert record == RECORD | {'params_sha256': digest}
  assert entries.record_of(folder / entries.PARAMS) == RECORD
  # What others may read of one file they may read of both.
  modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
  assert len(modes) == 1


def test_an_intact_entry_stays_and_a_damaged_one_makes_way(tmp_path):
  folder = tmp_path / 'net-1'
  entries.write(folder, _flat(0), RECORD)
  entries.write(folder, _flat(1), RECORD)
  _assert_same(entries.read(folder), _flat(0))
  for damage in (
    lambda: (folder / entries.PARAMS).write_bytes(b'cut'),
    lambda: (folder / entries.PARAMS).unlink(),
    lambda: (folder / entries.RECORD).unlink(),
    lambda: (folder / entries.RECORD).write_text('{'),
    lambda: (folder / entries.RECORD).write_text('[]'),
    lambda: (folder / entries.RECORD).write_text('{}'),
  ):
    damage()
    assert entries.read(folder) is None
    entries.write(folder, _flat(1), RECORD)
    _assert_same(entries.read(folder), _flat(1))
    assert _tree(tmp_path) == ['net-1', *_tree(folder)]


def test_flipped_bits_are_seen(tmp_path):
  folder = tmp_path / 'net-1'
  entries.write(folder, _flat(), RECORD)
  path = folder / entries.PARAMS
  data = bytearray(path.read_bytes())
  data[-3] ^= 1
  path.write_bytes(data)
  # Of correct form, so that the hash alone tells.
  assert safetensors_numpy.load_file(path).keys() == _flat().keys()
  assert entries.read(folder) is None


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  def fail(*args):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space'):
      entries.write(tmp_path / 'net-1', _flat(), RECORD)
  assert _tree(tmp_path) == []
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='[Nn]ot a directory'):
    entries.write(tmp_path / 'file' / 'net-1', _flat(), RECORD)


def test_what_a_killed_process_left_is_swept_after_a_day(tmp_path):
  old, new = tmp_path / '.net-1.aaa', tmp_path / '.net-1.bbb'
  for part, age in ((old, 2 * 24 * 3600), (new, 3600)):
    part.mkdir()
    (part / entries.PARAMS).touch()
    then = time.time() - age
    os.utime(part, (then, then))
  entries.write(tmp_path / 'net-1', _flat(), RECORD)
  assert not old.exists()
  assert new.exists()


def test_records_of_other_files(tmp_path):
  path = tmp_path / 'a.safetensors'
  for metadata in (None, {'selfboottok_jax': '{'}, {'selfboottok_jax': '[]'}):
    safetensors_numpy.save_file(_flat(), path, metadata)
    assert entries.record_of(path) is None


def test_digests(tmp_path):
  path = tmp_path / 'a'
  path.write_bytes(b'abc')
  wanted = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
  assert entries.digests({'x': path}) == {'x': wanted}
  with pytest.raises(errors.WeightsError, match='cannot be read'):
    entries.digests({'x': tmp_path})
