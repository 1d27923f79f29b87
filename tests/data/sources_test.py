import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import sources
from tests.data import trees

NAMES = [
  f'{split}/{kind}/{i}.png'
  for split in ('train', 'val')
  for kind in ('cat', 'bee')
  for i in range(3)
]


@pytest.fixture
def folder(tmp_path):
  root = trees.write(tmp_path / 'tree', *NAMES)
  (root / 'CLASSES.tsv').write_text('0\tcat\n')
  (root / 'train' / 'cat' / '._0.png').write_bytes(b'resource fork')
  (root / '.DS_Store').write_bytes(b'')
  return root


@pytest.mark.parametrize('top', ['.', 'photos', 'a/b'])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_folder_and_tar_agree(folder, tmp_path, top, split):
  tar = trees.pack(folder, tmp_path / 'photos.tar', top)
  one = sources.open_source('auto', str(folder), split, 32)
  two = sources.open_source('auto', str(tar), split, 32)
  assert one.fingerprint == two.fingerprint
  assert one.class_names == two.class_names == ('bee', 'cat')
  assert len(one) == len(two) == 6
  for i in range(6):
    np.testing.assert_array_equal(one[i]['image'], two[i]['image'])
    assert one[i]['label'] == two[i]['label'] == i // 3


def test_all_pictures_of_a_path(folder, tmp_path):
  one = sources.open_all(folder)
  assert list(one.names) == [
    f'{c}/{i}.png' for c in ('bee', 'cat') for i in (*(0, 1, 2),)
  ]
  assert one.prefix == 'val/'
  tar = trees.pack(folder, tmp_path / 'photos.tar', 'top')
  assert sources.open_all(tar).fingerprint == one.fingerprint
  # A folder without splits is one whole, whatever else is in it.
  whole = sources.open_all(folder / 'val')
  assert list(whole.names) == list(one.names)
  (folder / 'val' / 'loose.png').write_bytes(
    (folder / 'val' / 'cat' / '0.png').read_bytes()
  )
  assert len(sources.open_all(folder / 'val')) == 7
  for path, told in (
    (tmp_path / 'absent', '--flag=.*absent does not exist'),
    (folder / 'CLASSES.tsv', 'neither a folder nor a .tar'),
  ):
    with pytest.raises(errors.DataError, match=told):
      sources.open_all(path, flag='flag')
  with pytest.raises(errors.ConfigError, match="unknown split 'test'"):
    sources.open_all(folder, split='test')


def test_describe_names_what_was_opened(folder):
  source = sources.open_source('auto', str(folder), 'train', 32)
  text = sources.describe(source)
  assert str(folder) in text
  assert '6 images, 2 classes' in text
  assert source.fingerprint[:12] in text
  scenes = sources.open_source('procedural', '', 'val', 32)
  assert '2,000 images, 10 classes' in sources.describe(scenes)


@pytest.mark.parametrize(
  ('source', 'path', 'split', 'message'),
  [
    ('auto', '', 'train', 'path of the photographs is empty'),
    ('auto', '/nowhere/at all', 'train', '/nowhere/at all does not exist'),
    ('wds', '', 'train', "unknown data source 'wds'"),
    ('procedural', '', 'test', "unknown split 'test'"),
    ('procedural', '/photos', 'train', '/photos was given'),
    ('auto', 'EMPTY', 'train', 'holds no images'),
    ('auto', 'notes.txt', 'train', 'neither a folder nor a .tar'),
    ('folder', 'notes.txt', 'train', 'is no folder'),
    ('tar', 'EMPTY', 'train', 'is no file'),
    ('auto', 'photos.tar.gz', 'train', 'gzip-compressed.*gunzip'),
    ('auto', 'packed.tar', 'train', 'gzip-compressed'),
    ('auto', 'photos.zip', 'train', 'zip-compressed.*unzip'),
    ('auto', 'notes.tar', 'train', 'is no tar'),
    ('auto', 'short.tar', 'train', 'cut short'),
    ('auto', 'empty.tar', 'train', 'holds no images'),
    ('auto', 'blank.tar', 'train', 'is no tar'),
  ],
)
def test_bad_input_is_one_clear_line(
  folder, tmp_path, monkeypatch, source, path, split, message
):
  (tmp_path / 'EMPTY').mkdir()
  (tmp_path / 'notes.txt').write_text('hello')
  (tmp_path / 'notes.tar').write_text('hello' * 500)
  (tmp_path / 'blank.tar').write_bytes(b'')
  (tmp_path / 'photos.zip').write_bytes(b'PK\x03\x04rest')
  trees.pack(tmp_path / 'EMPTY', tmp_path / 'empty.tar')
  trees.pack(folder, tmp_path / 'photos.tar.gz', mode='w:gz')
  trees.pack(folder, tmp_path / 'packed.tar', mode='w:gz')
  whole = trees.pack(folder, tmp_path / 'whole.tar').read_bytes()
  end = whole.rindex(b'IEND')
  (tmp_path / 'short.tar').write_bytes(whole[: end - 8])
  monkeypatch.chdir(tmp_path)
  with pytest.raises(errors.UserError, match=message) as caught:
    sources.open_source(source, path, split, 32)
  assert '\n' not in str(caught.value)
