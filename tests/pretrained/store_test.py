import json
import pathlib
import shutil
import threading

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from selfboottok_jax import errors
from selfboottok_jax.pretrained import convert, entries, store
from selfboottok_jax.pretrained import published as published_lib
from tests.pretrained import fake_hub, weights

PUBLIC = published_lib.Published('org/net', ('model.bin',), 'MIT', 1.0, 'test')


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  folder = tmp_path / 'cache'
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(folder))
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  return folder


class Reader:
  """Reads one matrix, and counts how often."""

  def __init__(self):
    self.calls = 0

  def __call__(self, arrays, source):
    self.calls += 1
    convert.check(arrays, {'w': (2, 3)}, 'net', source, ['extra'])
    return {'layer': {'kernel': arrays['w'].T}}


def _file(path, value=1.0, **more):
  """As bytes, which a fake hub may serve too."""
  arrays = {'w': np.full((2, 3), value, np.float16), **more}
  path.parent.mkdir(parents=True, exist_ok=True)
  safetensors_numpy.save_file(arrays, path)
  return str(path)


def _load(source, read, shape_key=None, published=PUBLIC, name='net'):
  return store.load(name, source, published, shape_key or {}, read)


def _value(params):
  assert params.keys() == {'layer'}
  kernel = params['layer']['kernel']
  assert (kernel.dtype, kernel.shape) == (np.float32, (3, 2))
  assert (kernel == kernel[0, 0]).all()
  return kernel[0, 0]


def _message(source, read, **arguments):
  with pytest.raises(errors.WeightsError) as caught:
    _load(source, read, **arguments)
  message = str(caught.value)
  assert '\n' not in message
  return message


def _snapshot(folder):
  return {
    path.relative_to(folder): path.is_file() and path.read_bytes()
    for path in folder.rglob('*')
  }


def _entries(cache):
  return sorted(cache.glob('weights/net-*'))


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
  read, path = Reader(), _file(tmp_path / 'a.safetensors', 2)
  assert _value(_load(path, read)) == 2
  assert _value(_load(path, read)) == 2
  copy = shutil.copy(path, tmp_path / 'renamed.pth')
  assert _value(_load(str(copy), read)) == 2
  assert read.calls == 1
  (entry,) = _entries(cache)
  record = json.loads((entry / 'record.json').read_text())
  assert record['network'] == 'net'
  assert record['source'] == path
  assert record['files'] == {path: entries.sha256(pathlib.Path(path))}


def test_whatever_the_parameters_depend_on_is_another_entry(cache, tmp_path):
  read, path = Reader(), _file(tmp_path / 'a.safetensors', 2)
  _load(path, read, {'grid': (16, 16)})
  _load(path, read, {'grid': [16, 16]})
  assert read.calls == 1
  _load(path, read, {'grid': (8, 8)})
  assert read.calls == 2
  # A file that changed, under its old name.
  assert _value(_load(_file(tmp_path / 'a.safetensors', 3), read)) == 3
  assert len(_entries(cache)) == 3
  assert _value(_load(path, read, name='other')) == 3
  assert len(_entries(cache)) == 3


def test_a_damaged_entry_is_made_again(cache, tmp_path):
  read, path = Reader(), _file(tmp_path / 'a.safetensors', 2)
  _load(path, read)
  before = _snapshot(cache)
  (entry,) = _entries(cache)
  params = entry / entries.PARAMS
  params.write_bytes(params.read_bytes()[:-4])
  assert _value(_load(path, read)) == 2
  assert read.calls == 2
  assert _snapshot(cache) == before


def _bad_files(folder):
  good = pathlib.Path(_file(folder / 'good', 1)).read_bytes()
  wrong = np.zeros(3, np.float32)
  (folder / 'cut').write_bytes(good[:-1])
  (folder / 'text').write_bytes(b'hello')
  _file(folder / 'unexpected', more=wrong)
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
    _load(_file(tmp_path / 'a'), Reader())
  before = _snapshot(cache)
  assert bool(before) == begun
  folder = tmp_path / 'bad'
  for name, said in _bad_files(folder).items():
    message = _message(str(folder / name), Reader())
    assert said in message
    assert str(folder / name) in message
    assert _snapshot(cache) == before


def test_a_file_that_changes_while_it_is_read(cache, tmp_path):
  path, read = tmp_path / 'a', Reader()

  def grow(arrays, source):
    _file(path, 5)
    return read(arrays, source)

  assert 'changed while' in _message(_file(path), grow)
  assert not cache.exists()


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
  (tmp_path / 'file').touch()
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(tmp_path / 'file'))
  message = _message(_file(tmp_path / 'a'), Reader())
  assert 'set SELFBOOTTOK_CACHE' in message


def test_many_at_once_agree_and_leave_one_entry(cache, tmp_path):
  path, count = _file(tmp_path / 'a', 2), 6
  barrier, values = threading.Barrier(count), []

  def read(arrays, source):
    barrier.wait(30)
    return {'layer': {'kernel': arrays['w'].T}}

  def run():
    values.append(_value(_load(path, read)))

  threads = [threading.Thread(target=run) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert values == [2] * count
  assert [path.name for path in (cache / 'weights').iterdir()] == [
    entry.name for entry in _entries(cache)
  ]
  assert len(_entries(cache)) == 1


def test_a_repository_is_asked_once(cache, tmp_path, monkeypatch):
  body = pathlib.Path(_file(tmp_path / 'a', 2)).read_bytes()
  read = Reader()
  with fake_hub.serve({'org/net/main/model.bin': body}) as server:
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    assert _value(_load('', read)) == 2
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  # From the download, for another grid.
  assert _value(_load('org/net', read, {'grid': 8})) == 2
  assert read.calls == 2
  # From the entries, with the download gone.
  shutil.rmtree(cache / 'hub')
  for shape_key in ({}, {'grid': 8}):
    for source in ('', 'org/net', 'org/net@main'):
      assert _value(_load(source, read, shape_key)) == 2
  assert read.calls == 2
  for source, shape_key in (('org/net@v2', {}), ('', {'grid': 9})):
    message = _message(source, read, shape_key=shape_key)
    assert 'model.bin' in message
    assert 'net:FOLDER' in message


def test_a_damaged_entry_of_a_repository(cache, tmp_path, monkeypatch):
  body = pathlib.Path(_file(tmp_path / 'a', 2)).read_bytes()
  with fake_hub.serve({'org/net/main/model.bin': body}) as server:
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    _load('', Reader())
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  (entry,) = _entries(cache)
  before = _snapshot(cache)
  (entry / entries.PARAMS).write_bytes(b'')
  assert _value(_load('', Reader())) == 2
  assert _snapshot(cache) == before
  (entry / entries.PARAMS).write_bytes(b'')
  shutil.rmtree(cache / 'hub')
  message = _message('', Reader())
  assert f'{entry} is damaged and cannot be made again' in message
  # An index without its entry is as none.
  shutil.rmtree(entry)
  assert 'is damaged' not in _message('', Reader())
  for index in cache.glob('weights/index/*'):
    index.write_text('{')
  assert 'is damaged' not in _message('', Reader())


def test_offline_and_empty_names_the_file_and_its_place(cache, tmp_path):
  message = _message('', Reader())
  inbox = cache / 'files' / 'net'
  for part in ('model.bin', 'org/net', str(inbox)):
    assert part in message
  assert not cache.exists()
  # And what it says helps.
  _file(inbox / 'model.bin', 4)
  assert _value(_load('', Reader())) == 4


def test_several_files_are_one_network(tmp_path):
  one = weights.save(tmp_path / 'one.npz', {'extra': np.ones(4)})
  two = _file(tmp_path / 'two', 3)
  assert _value(_load(f'{one},{two}', Reader())) == 3
  message = _message(f'{two},{_file(tmp_path / "three", 4)}', Reader())
  assert 'has too (w)' in message


def _converted(tmp_path, shape_key=None):
  with store.watch() as records:
    _load(_file(tmp_path / 'a', 2), Reader(), shape_key)
  (record,) = records
  folder = tmp_path / 'converted'
  shutil.copytree(pathlib.Path(record['params']).parent, folder)
  return folder


def test_what_was_converted_elsewhere_is_read_as_it_is(
  cache, tmp_path, monkeypatch
):
  folder = _converted(tmp_path, {'grid': (4, 4)})
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(tmp_path / 'second'))
  read = Reader()
  alone = shutil.copy(folder / entries.PARAMS, tmp_path / 'alone.safetensors')
  for source in (folder, folder / entries.PARAMS, alone):
    with store.watch() as records:
      assert _value(_load(str(source), read, {'grid': (4, 4)})) == 2
    assert records[0]['network'] == 'net'
    assert records[0]['source'] == str(tmp_path / 'a')
  assert read.calls == 0
  assert not (tmp_path / 'second').exists()
  message = _message(str(folder), read, shape_key={'grid': (8, 8)})
  assert 'grid=[4, 4]' in message
  assert 'grid=[8, 8]' in message
  assert 'was converted for net' in _message(str(alone), read, name='other')
  params = folder / entries.PARAMS
  data = bytearray(params.read_bytes())
  data[-1] ^= 1
  params.write_bytes(data)
  message = _message(str(folder), read, shape_key={'grid': (4, 4)})
  assert 'not the file of its record.json' in message


def test_watching_tells_of_what_is_loaded_inside_alone(cache, tmp_path):
  path = _file(tmp_path / 'a')
  with store.watch() as records:
    _load(path, Reader())
    _load(path, Reader())
  _load(path, Reader())
  (entry,) = _entries(cache)
  assert [record['params'] for record in records] == [
    str(entry / entries.PARAMS)
  ] * 2


def test_part_of_a_checkpoint_is_of_the_key(tmp_path, monkeypatch):
  """Which file kinds have parts is `torch_files`' business."""
  value = {'ema': {'w': np.ones((2, 3))}, 'model': {'w': np.zeros((2, 3))}}
  monkeypatch.setattr(
    store.files, 'read', lambda path, part: value[part or 'ema']
  )
  path = _file(tmp_path / 'a')
  for part, wanted in (('', 1), ('model', 0), ('ema', 1)):
    params = store.load('net', path, None, {}, Reader(), part=part)
    assert _value(params) == wanted
