import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import contract, sources
from tests.pretrained import fake_hub

ONE = contract.Published('org/net', ('model.safetensors',), 'MIT', 1.0, 'test')
TWO = contract.Published(
  '', ('body.pth', 'head.pth'), 'MIT', 1.0, 'test', 'https://example.org/net'
)


def _touch(folder, *names):
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  return str(folder)


def _resolve(source, public, tmp_path):
  return sources.resolve('net', source, public, tmp_path / 'inbox')


def _names(place):
  return [path.name for path in place.files]


def _message(source, public, tmp_path):
  with pytest.raises(errors.WeightsError) as caught:
    _resolve(source, public, tmp_path)
  assert '\n' not in str(caught.value)
  return str(caught.value)


def test_a_file_and_several(tmp_path):
  folder = _touch(tmp_path, 'a.npz', 'b.pth')
  one = _resolve(f'{folder}/a.npz', ONE, tmp_path)
  assert (_names(one), one.label) == (['a.npz'], f'{folder}/a.npz')
  both = _resolve(f'{folder}/a.npz,{folder}/b.pth', ONE, tmp_path)
  assert _names(both) == ['a.npz', 'b.pth']
  message = _message(f'{folder}/a.npz,{folder}/c.pth', ONE, tmp_path)
  assert f"no weight file at '{folder}/c.pth'" in message


def test_home_is_understood(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', _touch(tmp_path, 'a.npz'))
  place = _resolve('~/a.npz', None, tmp_path)
  assert place.files == (tmp_path / 'a.npz',)


@pytest.mark.parametrize(
  ('held', 'public', 'wanted'),
  [
    (['model.safetensors', 'pytorch_model.bin'], ONE, ['model.safetensors']),
    (['weights.ckpt', 'config.json'], ONE, ['weights.ckpt']),
    (['weights.ckpt'], None, ['weights.ckpt']),
    (['head.pth', 'body.pth', 'other.pth'], TWO, ['body.pth', 'head.pth']),
    (['whole.npz'], TWO, ['whole.npz']),
  ],
)
def test_a_folder(tmp_path, held, public, wanted):
  folder = _touch(tmp_path / 'folder', *held)
  assert _names(_resolve(folder, public, tmp_path)) == wanted


def test_a_folder_with_the_subfolders_of_the_repository(tmp_path):
  public = contract.Published('org/net', ('vae/m.bin',), 'MIT', 1.0, 'test')
  for held in ('vae/m.bin', 'm.bin'):
    folder = _touch(tmp_path / held.replace('/', '_'), held, 'other.bin')
    place = _resolve(folder, public, tmp_path)
    assert [str(path) for path in place.files] == [f'{folder}/{held}']


@pytest.mark.parametrize(
  ('held', 'public', 'said'),
  [
    ([], ONE, ['no weight file', 'model.safetensors']),
    (['a.bin', 'b.bin'], ONE, ['a.bin, b.bin', 'model.safetensors']),
    (['a.bin', 'b.bin'], None, ['a.bin, b.bin', 'a single one']),
    (['body.pth'], TWO, ['has body.pth', 'body.pth and head.pth']),
    (['head.pth', 'x.txt'], TWO, ['has head.pth;', 'body.pth and head.pth']),
  ],
)
def test_a_folder_without_what_is_wanted(tmp_path, held, public, said):
  folder = tmp_path / 'folder'
  folder.mkdir()
  message = _message(_touch(folder, *held), public, tmp_path)
  for part in (str(folder), 'net:FILE', *said):
    assert part in message


@pytest.mark.parametrize(
  ('source', 'repository', 'revision'),
  [
    ('org/net', 'org/net', 'main'),
    ('org/net.v1', 'org/net.v1', 'main'),
    ('timm/vit_small_patch16_224.dino', 'timm/vit_small_patch16_224.dino', ''),
    ('org/net@v2', 'org/net', 'v2'),
    ('org/net@refs/pr/1', 'org/net', 'refs/pr/1'),
  ],
)
def test_a_repository(tmp_path, source, repository, revision):
  place = _resolve(source, ONE, tmp_path)
  revision = revision or 'main'
  assert place == sources.HubFiles(repository, revision, ('model.safetensors',))
  assert place.label == f'{repository}@{revision}'
  assert _resolve(source, None, tmp_path) == place


@pytest.mark.parametrize(
  'source', ['weights', './net', '/no/net', '~/net', 'a/b/c', 'org/net.pth']
)
def test_what_is_neither_here_nor_a_repository(tmp_path, source):
  message = _message(source, ONE, tmp_path)
  assert 'no weight file' in message
  assert 'net:ORG/REPO' in message


def test_what_is_here_comes_before_a_repository(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _touch(tmp_path, 'org/net/model.safetensors')
  assert isinstance(_resolve('org/net', ONE, tmp_path), sources.LocalFiles)


def test_the_published_place(tmp_path):
  inbox = tmp_path / 'inbox'
  assert _resolve('', ONE, tmp_path) == sources.HubFiles(
    'org/net', 'main', ('model.safetensors',), inbox
  )
  message = _message('', TWO, tmp_path)
  for part in ('body.pth and head.pth', TWO.url, str(inbox), 'net:FOLDER'):
    assert part in message
  assert 'net:FILE' in _message('', None, tmp_path)


def test_files_that_were_brought_by_hand_stand_for_it(tmp_path):
  inbox = tmp_path / 'inbox'
  inbox.mkdir()
  assert isinstance(_resolve('', ONE, tmp_path), sources.HubFiles)
  _touch(inbox, 'model.safetensors')
  assert _resolve('', ONE, tmp_path).files == (inbox / 'model.safetensors',)
  # A repository that was named is another place.
  assert isinstance(_resolve('org/net', ONE, tmp_path), sources.HubFiles)
  (inbox / 'model.safetensors').rename(inbox / 'body.pth')
  assert 'body.pth and head.pth' in _message('', TWO, tmp_path)


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
  return sources.HubFiles(repository, revision, files, inbox)


def _download_message(place, cache):
  with pytest.raises(errors.WeightsError) as caught:
    sources.download('net', place, cache)
  message = str(caught.value)
  assert '\n' not in message
  for part in (place.label, place.files[0], 'net:FOLDER', str(cache)):
    assert part in message
  return message


def test_files_come_once_and_are_kept(server, tmp_path):
  cache = tmp_path / 'hub'
  paths = sources.download('net', _place(), cache)
  for file, path in paths.items():
    assert path.is_relative_to(cache)
    assert path.read_bytes() == FILES[f'org/net/main/{file}']
  assert server.asked
  server.asked.clear()
  assert sources.download('net', _place(), cache) == paths
  assert not server.asked


def test_what_was_downloaded_needs_no_connection(
  server, tmp_path, monkeypatch, capfd
):
  paths = sources.download('net', _place(), tmp_path)
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  assert sources.download('net', _place(), tmp_path) == paths
  # The commit of the branch is the same file.
  pinned = _place(revision=fake_hub.COMMIT, files=BOTH[:1])
  assert sources.download('net', pinned, tmp_path) == {
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
  assert said in _download_message(place, tmp_path)


def test_without_a_connection_it_says_what_to_bring(
  tmp_path, monkeypatch, capfd
):
  monkeypatch.setenv('HF_ENDPOINT', fake_hub.refusing())
  cache, inbox = tmp_path / 'cache', tmp_path / 'inbox'
  message = _download_message(_place(inbox=inbox), cache)
  assert 'model.safetensors and vae/stats.bin' in message
  assert f'put it into {inbox}, or into any folder' in message
  assert str(inbox) not in _download_message(_place(), cache)
  # One error is enough, and nothing is left behind.
  assert capfd.readouterr() == ('', '')
  assert not cache.exists()


def test_a_download_that_breaks_off(server, tmp_path, monkeypatch):
  """The server closes in the middle of the body."""
  monkeypatch.setattr(
    fake_hub._Handler, 'do_GET', lambda self: self._answer() and None
  )
  message = _download_message(_place(files=BOTH[:1]), tmp_path)
  assert 'the download failed' in message
  monkeypatch.undo()
  monkeypatch.setenv('HF_ENDPOINT', server.url)
  paths = sources.download('net', _place(), tmp_path)
  assert paths[BOTH[0]].read_bytes() == b'the model'


def test_a_cache_that_cannot_be_written(server, tmp_path):
  (tmp_path / 'file').touch()
  assert 'the download failed' in _download_message(
    _place(), tmp_path / 'file' / 'hub'
  )
