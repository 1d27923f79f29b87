import pytest

from selfboottok_jax import files


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
