import os
import pathlib
import subprocess
import sys

import pytest
from etils import epath

from selfboottok_jax import errors, files


def test_replaces_the_whole_file_in_new_folders(tmp_path):
  path = tmp_path / 'a' / 'b' / 'file'
  assert files.write_atomically(path, b'a long first text') == path
  files.write_atomically(str(path), b'second')
  assert path.read_bytes() == b'second'
  assert [p.name for p in path.parent.iterdir()] == ['file']


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
  path = files.write_atomically(tmp_path / 'file', b'old')

  def fail(source, target):
    raise OSError('disk full')

  monkeypatch.setattr(files.os, 'replace', fail)
  with pytest.raises(OSError, match='disk full'):
    files.write_atomically(path, b'new')
  assert path.read_bytes() == b'old'
  assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_only_partials_are_removed(tmp_path):
  kept = files.write_atomically(tmp_path / 'a' / 'file', b'whole')
  other = files.write_atomically(tmp_path / 'a' / 'no.partial', b'whole')
  (tmp_path / 'a' / '.file.41.partial').write_bytes(b'half')
  files.remove_partials(tmp_path)
  assert len(list(kept.parent.iterdir())) == 3
  files.remove_partials(kept.parent)
  assert sorted(kept.parent.iterdir()) == [kept, other]


@pytest.fixture
def home(tmp_path, monkeypatch):
  folder = tmp_path / 'a home'
  monkeypatch.setenv('HOME', str(folder))
  return folder


@pytest.mark.parametrize('given', ['~/runs/tok', '~/runs/tok/'])
@pytest.mark.parametrize('kind', [str, pathlib.Path, epath.Path])
def test_home_is_expanded(home, given, kind):
  assert files.as_path(kind(given)) == home / 'runs' / 'tok'
  assert files.absolute(kind(given)) == home / 'runs' / 'tok'


@pytest.mark.parametrize('given', ['a b/ü', 'a:b/c', 'dinov2:/x', '.', '../~x'])
def test_other_local_paths_are_as_given(home, given):
  path = files.as_path(given)
  assert path == pathlib.Path(given)
  assert not files.is_remote(path)


@pytest.fixture
def with_client(monkeypatch):
  """As where the package for gs:// is installed."""
  monkeypatch.setattr(files.importlib.util, 'find_spec', lambda name: name)


@pytest.mark.usefixtures('with_client')
@pytest.mark.parametrize(
  'given',
  [
    'gs://bucket/runs/a ü',
    'gs://bucket/runs/a ü/',
    'gs:///bucket//runs/x/../a ü',
    # What pathlib leaves of it.
    pathlib.Path('gs://bucket/runs/a ü'),
    epath.Path('gs://bucket/runs/a ü'),
  ],
)
def test_objects_of_a_bucket(given):
  path = files.as_path(given)
  assert str(path) == 'gs://bucket/runs/a ü'
  assert files.is_remote(path)
  assert files.as_path(path) == files.absolute(path) == path
  assert str(path / 'x') == 'gs://bucket/runs/a ü/x'


@pytest.mark.usefixtures('with_client')
@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ('s3://bucket/x', 's3://bucket/x is of a kind that is not known; wanted a'),
    ('https://host/x', 'not known; wanted a local path, or gs://BUCKET/NAME'),
    ('file:///x', 'not known'),
    ('gs://', 'gs:// names no bucket; wanted gs://BUCKET/NAME'),
    ('gs://bucket/../../x', 'names no bucket'),
    ('gs://My Bucket/x', 'names no bucket'),
  ],
)
def test_other_urls_are_refused(given, told):
  with pytest.raises(errors.ConfigError, match=told):
    files.as_path(given)


def test_without_its_package_gs_is_refused(monkeypatch):
  monkeypatch.setattr(files.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.ConfigError, match=r"pip install '.*\[gcs\]', or"):
    files.as_path('gs://bucket/x')
  with pytest.raises(errors.ConfigError, match='gs://bucket/x needs gcsfs'):
    files.check_folder('workdir', 'gs://bucket/x')


@pytest.mark.usefixtures('with_client')
def test_what_must_be_local_says_why(home):
  given = 'gs://bucket/x'
  with pytest.raises(errors.ConfigError) as caught:
    files.local_path('--out', given, 'wanted a disk')
  assert str(caught.value) == f'--out={given} is no local path; wanted a disk'
  assert files.local_path('--out', '~/x', '') == home / 'x'


def test_children_of_a_folder(tmp_path):
  assert files.children(tmp_path / 'absent') == []
  names = {'x', '.hidden', 'backup~'}
  for name in names:
    (tmp_path / name).touch()
  assert {path.name for path in files.children(tmp_path)} == names
  assert not files.is_vacant(tmp_path)
  with pytest.raises(NotADirectoryError):
    files.is_vacant(tmp_path / 'x')


def test_objects_are_written_whole(store, bucket):
  path = files.write_atomically(f'{bucket}/a b/ü', b'a long first text')
  files.write_atomically(str(path), b'second', durable=True)
  files.write_json(f'{bucket}/a b/x.json', {'y': 1})
  assert store.names(bucket) == ['a b/x.json', 'a b/ü']
  assert path.read_bytes() == store.read(f'{bucket}/a b/ü') == b'second'


def _break_off(path, error):
  with files.writing(path) as file:
    file.write(b'half')
    raise error


def test_a_stream_becomes_an_object_at_its_end(store, bucket):
  path = files.as_path(f'{bucket}/big')
  # Several parts.
  data = bytes(range(256)) * 40_000
  with files.writing(path) as file:
    file.write(data[:6_000_000])
    assert not path.exists()
    file.write(data[6_000_000:])
  assert store.read(str(path)) == data
  for error in (ValueError, KeyboardInterrupt):
    with pytest.raises(error):
      _break_off(path, error)
  assert store.read(str(path)) == data
  assert store.names(bucket) == ['big']


def test_a_stream_that_breaks_off_leaves_the_old_file(tmp_path):
  path = files.write_atomically(tmp_path / 'file', b'old')
  with pytest.raises(KeyError):
    _break_off(path, KeyError)
  assert path.read_bytes() == b'old'
  assert [p.name for p in tmp_path.iterdir()] == ['file']


def test_objects_of_others_are_seen_at_once(store, bucket):
  folder = files.as_path(f'{bucket}/run')
  assert files.children(folder) == []
  assert files.is_vacant(folder)
  store.put(f'{folder}/.a.partial', b'')
  # The web console makes folders so.
  store.put(f'{folder}/', b'')
  assert files.is_vacant(folder)
  store.put(f'{folder}/b/c', b'')
  assert not files.is_vacant(folder)
  names = [path.name for path in files.children(folder)]
  assert sorted(names) == ['.a.partial', 'b']
  files.remove_partials(folder)
  assert store.names(str(folder)) == ['', 'b/c']
  files.remove_tree(folder / 'b')
  files.remove_tree(folder / 'absent')
  assert not (folder / 'b').exists()


def test_a_file_must_be_writable(tmp_path, monkeypatch):
  files.check_file('out', tmp_path / 'new' / 'x.json')
  assert not list(tmp_path.iterdir())
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.ConfigError, match=f'--out={tmp_path} is a folder'):
    files.check_file('out', tmp_path)
  given = tmp_path / 'file' / 'x.json'
  with pytest.raises(
    errors.ConfigError, match=f'--out={given} cannot be .* no'
  ):
    files.check_file('out', given)
  # Tests may run as root, who may write everywhere.
  monkeypatch.setattr(os, 'access', lambda *_: False)
  with pytest.raises(errors.ConfigError, match='is not writable'):
    files.check_file('out', tmp_path / 'x.json')


def test_a_bucket_must_be_writable(store, bucket):
  files.check_folder('out', f'{bucket}/new')
  assert not store.names(bucket)
  with pytest.raises(errors.ConfigError) as caught:
    files.check_folder('out', 'gs://absent-bucket/x')
  assert str(caught.value).startswith(
    '--out=gs://absent-bucket/x cannot be written: there is no such bucket; '
  )
  store.forbidden.add('locked-bucket')
  with pytest.raises(errors.ConfigError, match='Caller has no access'):
    files.check_folder('out', 'gs://locked-bucket/x')
  with pytest.raises(errors.UserError, match='cannot be reached .*no access'):
    files.children('gs://locked-bucket/x')
  with pytest.raises(errors.UserError, match='cannot be reached .*no access'):
    files.write_atomically('gs://locked-bucket/x', b'')


def test_errors_of_local_files_stay_theirs(tmp_path):
  with pytest.raises(ValueError, match='own'), files.reaching(tmp_path):
    raise ValueError('own')


TENSORFLOW_IS_LEFT_ALONE = """
import importlib.util, sys
from selfboottok_jax import files
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: name in ('tensorflow', 'gcsfs') or (
  find(name, *a)
)
path = files.as_path('gs://bucket/x')
assert type(path._backend).__name__ == '_FileSystemSpecBackend', path._backend
assert 'gcsfs' not in sys.modules
"""


def test_tensorflow_is_left_alone():
  subprocess.run([sys.executable, '-c', TENSORFLOW_IS_LEFT_ALONE], check=True)
