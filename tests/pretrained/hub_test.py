import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import hub, sources
from tests.pretrained import fake_hub

FILES = {
  'org/net/main/model.safetensors': b'the model',
  'org/net/main/vae/stats.bin': b'its statistics',
  f'org/net/{fake_hub.COMMIT}/model.safetensors': b'the model',
}
BOTH = ('model.safetensors', 'vae/stats.bin')


@pytest.fixture
def server(monkeypatch):
  with fake_hub.serve(dict(FILES)) as running:
    monkeypatch.setenv('HF_ENDPOINT', running.url)
    yield running


def _place(repository='org/net', revision='main', files=BOTH, inbox=None):
  return sources.Hub(repository, revision, files, inbox)


def _message(place, cache):
  with pytest.raises(errors.WeightsError) as caught:
    hub.download('net', place, cache)
  message = str(caught.value)
  assert '\n' not in message
  for part in (place.label, place.files[0], 'net:FOLDER', str(cache)):
    assert part in message
  return message


def test_files_come_once_and_are_kept(server, tmp_path):
  cache = tmp_path / 'hub'
  paths = hub.download('net', _place(), cache)
  for file, path in paths.items():
    assert path.is_relative_to(cache)
    assert path.read_bytes() == FILES[f'org/net/main/{file}']
  assert server.asked
  server.asked.clear()
  assert hub.download('net', _place(), cache) == paths
  assert not server.asked


def test_what_was_downloaded_needs_no_connection(
  server, tmp_path, monkeypatch, capfd
):
  paths = hub.download('net', _place(), tmp_path)
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  assert hub.download('net', _place(), tmp_path) == paths
  # The commit of the branch is the same file.
  pinned = _place(revision=fake_hub.COMMIT, files=BOTH[:1])
  assert hub.download('net', pinned, tmp_path) == {
    BOTH[0]: paths[BOTH[0]],
  }
  assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize(
  ('place', 'said'),
  [
    (_place('org/gated'), 'HF_TOKEN'),
    (_place('org/none'), 'no such repository'),
    (_place('org/broken'), '500'),
    (_place(revision='v9'), 'no such revision'),
    (_place(files=('other.bin',)), 'no such file'),
    (_place(files=(BOTH[0], 'other.bin')), 'no such file'),
    (_place('org/..'), 'the download failed'),
  ],
)
def test_refusals(server, tmp_path, place, said):
  assert said in _message(place, tmp_path)


def test_without_a_connection_it_says_what_to_bring(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  cache, inbox = tmp_path / 'cache', tmp_path / 'inbox'
  message = _message(_place(inbox=inbox), cache)
  assert 'model.safetensors and vae/stats.bin' in message
  assert f'put it into {inbox}, or into any folder' in message
  assert str(inbox) not in _message(_place(), cache)
  # One error is enough, and nothing is left behind.
  assert capfd.readouterr() == ('', '')
  assert not cache.exists()


def test_a_download_that_breaks_off(server, tmp_path, monkeypatch):
  """The server closes in the middle of the body."""
  monkeypatch.setattr(
    fake_hub._Handler, 'do_GET', lambda self: self._answer() and None
  )
  message = _message(_place(files=BOTH[:1]), tmp_path)
  assert 'the download failed' in message
  monkeypatch.undo()
  monkeypatch.setenv('HF_ENDPOINT', server.url)
  paths = hub.download('net', _place(), tmp_path)
  assert paths[BOTH[0]].read_bytes() == b'the model'


def test_a_cache_that_cannot_be_written(server, tmp_path):
  (tmp_path / 'file').touch()
  assert 'the download failed' in _message(_place(), tmp_path / 'file' / 'hub')
