"""Weights that are imported from the hub into the cache."""

import pathlib
import shutil

import pytest

from selfboottok_jax.pretrained import store
from tests.pretrained import fake_hub, stores


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  return stores.isolate(tmp_path, monkeypatch)


def test_a_repository_is_asked_once(cache, tmp_path, monkeypatch):
  body = pathlib.Path(stores.write(tmp_path / 'a', 2)).read_bytes()
  read = stores.Reader()
  with fake_hub.serve({'org/net/main/model.bin': body}) as server:
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    assert stores.value(stores.load('', read)) == 2
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  # From the download, for another grid.
  assert stores.value(stores.load('org/net', read, {'grid': 8})) == 2
  assert read.calls == 2
  # From the entries, with the download gone.
  shutil.rmtree(cache / 'hub')
  for shape_key in ({}, {'grid': 8}):
    for source in ('', 'org/net', 'org/net@main'):
      assert stores.value(stores.load(source, read, shape_key)) == 2
  assert read.calls == 2
  for source, shape_key in (('org/net@v2', {}), ('', {'grid': 9})):
    message = stores.message(source, read, shape_key=shape_key)
    assert 'model.bin' in message
    assert 'net:FOLDER' in message


def test_a_damaged_entry_of_a_repository(cache, tmp_path, monkeypatch):
  body = pathlib.Path(stores.write(tmp_path / 'a', 2)).read_bytes()
  with fake_hub.serve({'org/net/main/model.bin': body}) as server:
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    stores.load('', stores.Reader())
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  (entry,) = stores.entries_of(cache)
  before = stores.snapshot(cache)
  (entry / store.PARAMS).write_bytes(b'')
  assert stores.value(stores.load('', stores.Reader())) == 2
  assert stores.snapshot(cache) == before
  (entry / store.PARAMS).write_bytes(b'')
  shutil.rmtree(cache / 'hub')
  message = stores.message('', stores.Reader())
  assert f'{entry} is damaged and cannot be made again' in message
  # An index without its entry is as none.
  shutil.rmtree(entry)
  assert 'is damaged' not in stores.message('', stores.Reader())
  for index in cache.glob('weights/index/*'):
    index.write_text('{')
  assert 'is damaged' not in stores.message('', stores.Reader())


def test_offline_and_empty_names_the_file_and_its_place(cache, tmp_path):
  message = stores.message('', stores.Reader())
  inbox = cache / 'files' / 'net'
  for part in ('model.bin', 'org/net', str(inbox)):
    assert part in message
  assert not cache.exists()
  # And what it says helps.
  stores.write(inbox / 'model.bin', 4)
  assert stores.value(stores.load('', stores.Reader())) == 4
