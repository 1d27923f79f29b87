"""Weights that are imported from files into the cache."""

import json
import os
import pathlib
import shutil
import stat
import threading
import time

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from selfboottok_jax import errors, trees
from selfboottok_jax.pretrained import store
from tests.pretrained import stores, weights

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
  flat = store.as_arrays(params)
  assert list(flat) == ['a/b/c', 'a/d', 'e.f']
  assert {array.dtype for array in flat.values()} == {np.dtype(np.float32)}
  assert trees.unflatten(flat, '/').keys() == params.keys()
  _assert_same(store.as_arrays(trees.unflatten(flat, '/')), flat)


@pytest.mark.parametrize('key', ['a/b', 3])
def test_keys_that_could_not_be_told_apart(key):
  with pytest.raises(ValueError, match='wanted no'):
    store.as_arrays({'x': {key: np.ones(1)}})


def test_leaves_are_own_copies_as_they_will_be_written(tmp_path):
  source = np.arange(6, dtype=np.float32).reshape(2, 3)
  flat = store.as_arrays({'a': source.T, 'b': source[0], 'c': source[0, 0]})
  assert not any(np.shares_memory(a, source) for a in flat.values())
  store.write_entry(tmp_path / 'net-1', flat, RECORD)
  read = store.read_entry(tmp_path / 'net-1')
  np.testing.assert_array_equal(read['a'], source.T)
  assert read['c'].shape == ()


def test_an_entry_and_its_record(tmp_path):
  folder = tmp_path / 'weights' / 'net-1'
  assert store.read_entry(folder) is None
  store.write_entry(folder, _flat(), RECORD)
  _assert_same(store.read_entry(folder), _flat())
  assert _tree(folder) == [store.PARAMS, store.RECORD]
  assert _tree(tmp_path / 'weights') == ['net-1', *_tree(folder)]
  record = json.loads((folder / store.RECORD).read_text())
  digest = store.sha256(folder / store.PARAMS)
  assert record == RECORD | {'params_sha256': digest}
  assert store.record_of(folder / store.PARAMS) == RECORD
  # Both files of an entry have the same permissions.
  modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
  assert len(modes) == 1


def test_an_intact_entry_stays_and_a_damaged_one_makes_way(tmp_path):
  folder = tmp_path / 'net-1'
  store.write_entry(folder, _flat(0), RECORD)
  store.write_entry(folder, _flat(1), RECORD)
  _assert_same(store.read_entry(folder), _flat(0))
  for damage in (
    lambda: (folder / store.PARAMS).write_bytes(b'cut'),
    lambda: (folder / store.PARAMS).unlink(),
    lambda: (folder / store.RECORD).unlink(),
    lambda: (folder / store.RECORD).write_text('{'),
    lambda: (folder / store.RECORD).write_text('[]'),
    lambda: (folder / store.RECORD).write_text('{}'),
  ):
    damage()
    assert store.read_entry(folder) is None
    store.write_entry(folder, _flat(1), RECORD)
    _assert_same(store.read_entry(folder), _flat(1))
    assert _tree(tmp_path) == ['net-1', *_tree(folder)]


def test_flipped_bits_are_seen(tmp_path):
  folder = tmp_path / 'net-1'
  store.write_entry(folder, _flat(), RECORD)
  path = folder / store.PARAMS
  data = bytearray(path.read_bytes())
  data[-3] ^= 1
  path.write_bytes(data)
  # Its form is correct, so that only the hash gives it away.
  assert safetensors_numpy.load_file(path).keys() == _flat().keys()
  assert store.read_entry(folder) is None


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  def fail(*args):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='No space'):
      store.write_entry(tmp_path / 'net-1', _flat(), RECORD)
  assert _tree(tmp_path) == []
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='[Nn]ot a directory'):
    store.write_entry(tmp_path / 'file' / 'net-1', _flat(), RECORD)


def test_what_a_killed_process_left_is_swept_after_a_day(tmp_path):
  old, new = tmp_path / '.net-1.aaa', tmp_path / '.net-1.bbb'
  for part, age in ((old, 2 * 24 * 3600), (new, 3600)):
    part.mkdir()
    (part / store.PARAMS).touch()
    then = time.time() - age
    os.utime(part, (then, then))
  store.write_entry(tmp_path / 'net-1', _flat(), RECORD)
  assert not old.exists()
  assert new.exists()


def test_records_of_other_files(tmp_path):
  path = tmp_path / 'a.safetensors'
  for metadata in (None, {'selfboottok_jax': '{'}, {'selfboottok_jax': '[]'}):
    safetensors_numpy.save_file(_flat(), path, metadata)
    assert store.record_of(path) is None


def test_digests(tmp_path):
  path = tmp_path / 'a'
  path.write_bytes(b'abc')
  wanted = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'
  assert store.digests({'x': path}) == {'x': wanted}
  with pytest.raises(errors.WeightsError, match='cannot be read'):
    store.digests({'x': tmp_path})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  return stores.isolate(tmp_path, monkeypatch)


def test_where_the_cache_is(monkeypatch, cache, tmp_path):
  assert store.cache_folder() == cache
  monkeypatch.delenv('SELFBOOTTOK_CACHE')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  assert store.cache_folder() == tmp_path / 'selfboottok_jax'
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert store.cache_folder() == tmp_path / '.cache' / 'selfboottok_jax'
  monkeypatch.setenv('SELFBOOTTOK_CACHE', '~/here')
  assert store.cache_folder() == tmp_path / 'here'


def test_a_file_is_imported_once(cache, tmp_path):
  read, path = stores.Reader(), stores.write(tmp_path / 'a.safetensors', 2)
  assert stores.value(stores.load(path, read)) == 2
  assert stores.value(stores.load(path, read)) == 2
  copy = shutil.copy(path, tmp_path / 'renamed.pth')
  assert stores.value(stores.load(str(copy), read)) == 2
  assert read.calls == 1
  (entry,) = stores.entries_of(cache)
  record = json.loads((entry / 'record.json').read_text())
  assert record['network'] == 'net'
  assert record['source'] == path
  assert record['files'] == {path: store.sha256(pathlib.Path(path))}


def test_whatever_the_parameters_depend_on_is_another_entry(cache, tmp_path):
  read, path = stores.Reader(), tmp_path / 'a.safetensors'
  stores.write(path, 2)
  stores.load(str(path), read, {'grid': (16, 16)})
  stores.load(str(path), read, {'grid': [16, 16]})
  assert read.calls == 1
  stores.load(str(path), read, {'grid': (8, 8)})
  assert read.calls == 2
  # A file that changed, under its old name.
  stores.write(path, 3)
  assert stores.value(stores.load(str(path), read)) == 3
  assert len(stores.entries_of(cache)) == 3
  assert stores.value(stores.load(str(path), read, name='other')) == 3
  assert len(stores.entries_of(cache)) == 3


def test_a_damaged_entry_is_made_again(cache, tmp_path):
  read, path = stores.Reader(), stores.write(tmp_path / 'a.safetensors', 2)
  stores.load(path, read)
  before = stores.snapshot(cache)
  (entry,) = stores.entries_of(cache)
  params = entry / store.PARAMS
  params.write_bytes(params.read_bytes()[:-4])
  assert stores.value(stores.load(path, read)) == 2
  assert read.calls == 2
  assert stores.snapshot(cache) == before


def _bad_files(folder):
  good = pathlib.Path(stores.write(folder / 'good', 1)).read_bytes()
  wrong = np.zeros(3, np.float32)
  (folder / 'cut').write_bytes(good[:-1])
  (folder / 'text').write_bytes(b'hello')
  stores.write(folder / 'unexpected', more=wrong)
  safetensors_numpy.save_file({'w': wrong}, folder / 'size')
  safetensors_numpy.save_file({'v': wrong}, folder / 'other')
  np.savez(folder / 'objects.npz', w=np.array([{}], dtype=object))
  return {
    'cut': 'not an intact safetensors',
    'text': 'holds no weights',
    'unexpected': '1 unexpected: more',
    'size': 'w is (3,), wanted (2, 3)',
    'other': 'another network',
    'objects.npz': 'allow_pickle',
    'missing': 'no weight file',
  }


@pytest.mark.parametrize('begun', [False, True])
def test_a_failed_import_leaves_the_cache_as_it_was(cache, tmp_path, begun):
  if begun:
    stores.load(stores.write(tmp_path / 'a'), stores.Reader())
  before = stores.snapshot(cache)
  assert bool(before) == begun
  folder = tmp_path / 'bad'
  for name, said in _bad_files(folder).items():
    message = stores.message(str(folder / name), stores.Reader())
    assert said in message
    assert str(folder / name) in message
    assert stores.snapshot(cache) == before


def test_a_file_that_changes_while_it_is_read(cache, tmp_path):
  path, read = tmp_path / 'a', stores.Reader()

  def grow(arrays, source):
    stores.write(path, 5)
    return read(arrays, source)

  assert 'changed while' in stores.message(stores.write(path), grow)
  assert not cache.exists()


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(tmp_path / 'file'))
  message = stores.message(stores.write(tmp_path / 'a'), stores.Reader())
  assert 'set SELFBOOTTOK_CACHE' in message


def test_many_at_once_agree_and_leave_one_entry(cache, tmp_path):
  path, count = stores.write(tmp_path / 'a', 2), 6
  barrier, values = threading.Barrier(count), []

  def read(arrays, source):
    barrier.wait(30)
    return {'layer': {'kernel': arrays['w'].T}}

  def run():
    values.append(stores.value(stores.load(path, read)))

  threads = [threading.Thread(target=run) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert values == [2] * count
  assert [path.name for path in (cache / 'weights').iterdir()] == [
    entry.name for entry in stores.entries_of(cache)
  ]
  assert len(stores.entries_of(cache)) == 1


def test_several_files_are_one_network(tmp_path):
  one = weights.save(tmp_path / 'one.npz', {'extra': np.ones(4)})
  two = stores.write(tmp_path / 'two', 3)
  assert stores.value(stores.load(f'{one},{two}', stores.Reader())) == 3
  three = stores.write(tmp_path / 'three', 4)
  message = stores.message(f'{two},{three}', stores.Reader())
  assert 'has too (w)' in message


def _converted(tmp_path, shape_key=None):
  with store.watch() as records:
    stores.load(stores.write(tmp_path / 'a', 2), stores.Reader(), shape_key)
  (record,) = records
  folder = tmp_path / 'converted'
  shutil.copytree(pathlib.Path(record['params']).parent, folder)
  return folder


def test_what_was_converted_elsewhere_is_read_as_it_is(
  cache, tmp_path, monkeypatch
):
  folder = _converted(tmp_path, {'grid': (4, 4)})
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(tmp_path / 'second'))
  read = stores.Reader()
  alone = shutil.copy(folder / store.PARAMS, tmp_path / 'alone.safetensors')
  for source in (folder, folder / store.PARAMS, alone):
    with store.watch() as records:
      assert stores.value(stores.load(str(source), read, {'grid': (4, 4)})) == 2
    assert records[0]['network'] == 'net'
    assert records[0]['source'] == str(tmp_path / 'a')
  assert read.calls == 0
  assert not (tmp_path / 'second').exists()
  message = stores.message(str(folder), read, shape_key={'grid': (8, 8)})
  assert 'grid=[4, 4]' in message
  assert 'grid=[8, 8]' in message
  message = stores.message(str(alone), read, name='other')
  assert 'was converted for net' in message
  params = folder / store.PARAMS
  data = bytearray(params.read_bytes())
  data[-1] ^= 1
  params.write_bytes(data)
  message = stores.message(str(folder), read, shape_key={'grid': (4, 4)})
  assert 'not the file of its record.json' in message


def test_watching_tells_of_what_is_loaded_inside_alone(cache, tmp_path):
  path = stores.write(tmp_path / 'a')
  with store.watch() as records:
    stores.load(path, stores.Reader())
    stores.load(path, stores.Reader())
  stores.load(path, stores.Reader())
  (entry,) = stores.entries_of(cache)
  assert [record['params'] for record in records] == [
    str(entry / store.PARAMS)
  ] * 2
