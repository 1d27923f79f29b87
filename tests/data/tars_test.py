import concurrent.futures
import io
import os
import pathlib
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.data import joined, picture_set, sources, tars
from tests.data import trees


def open_tar(path, split='train'):
  return picture_set.PictureSource(joined.open_trees([str(path)]), split)


def add(archive, name, data=b'', **fields):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for key, value in fields.items():
    setattr(info, key, value)
  archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def tar(tmp_path):
  root = trees.write(tmp_path / 'tree', *trees.NAMES)
  return trees.pack(root, tmp_path / 'photos.tar')


def test_tars_are_read_from_many_threads_and_copies(tar):
  source = open_tar(tar)
  copy = pickle.loads(pickle.dumps(source))
  wanted = [source[i]['image'] for i in range(6)]
  order = list(range(6)) * 20
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for reader in (source, copy):
      images = list(pool.map(lambda i, r=reader: r[i]['image'], order))
      for i, image in zip(order, images, strict=True):
        np.testing.assert_array_equal(image, wanted[i])


def test_sources_close_their_files(tar):
  before = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc') else 0
  for _ in range(5):
    open_tar(tar)
  after = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc') else 0
  assert after == before


@pytest.mark.parametrize('prefix', ['', '/data/', './', '../photos/', 'x/../'])
@pytest.mark.parametrize('kind', [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_pictures(tmp_path, prefix, kind):
  path = tmp_path / 'links.tar'
  target = f'{prefix}a/' if kind == tarfile.LNKTYPE else '../a/'
  with tarfile.open(path, 'w') as archive:
    for i in range(12):
      add(archive, f'{prefix}a/{i:02}.png', trees.png(i))
    for i in range(12):
      add(archive, f'{prefix}c/{i:02}.png', type=kind,
          linkname=f'{target}{i:02}.png')  # fmt: skip
  found = joined.open_trees([str(path)])
  assert found.class_names == ('a', 'c')
  source = picture_set.PictureSource(found, 'train')
  assert sum(len(part) for part in found.splits.values()) == 24
  for i in range(len(source)):
    seed = int(source.name(i)[-6:-4])
    image = np.asarray(trees.picture(seed))
    np.testing.assert_array_equal(source[i]['image'], image)


def test_a_link_may_come_before_what_it_leads_to_and_name_a_folder(tmp_path):
  path = tmp_path / 'links.tar'
  with tarfile.open(path, 'w') as archive:
    add(archive, 'val', type=tarfile.SYMTYPE, linkname='train')
    for i in range(4):
      add(archive, f'train/a/{i}.png', trees.png(i))
    add(archive, 'train/b', type=tarfile.SYMTYPE, linkname='a')
    # It leads back to a folder of its own branch.
    add(archive, 'train/a/up', type=tarfile.SYMTYPE, linkname='..')
    add(archive, 'train/a/gone.png', type=tarfile.SYMTYPE, linkname='no.png')
    add(archive, 'train/a/self.png', type=tarfile.SYMTYPE, linkname='self.png')
  found = joined.open_trees([str(path)])
  assert [len(part) for part in found.splits.values()] == [8, 8]
  assert found.class_names == ('a', 'b')
  bad = {item.path: item.reason for item in found.bad}
  assert 'no.png, which is not there' in bad['train/a/gone.png']
  assert 'train/a/self.png' in bad


def test_tars_one_after_another_are_one(tar, tmp_path):
  root = trees.write(tmp_path / 'more', 'train/bee/9.png', 'train/ant/1.png')
  second = trees.pack(root, tmp_path / 'more.tar')
  both = tmp_path / 'both.tar'
  both.write_bytes(tar.read_bytes() + second.read_bytes())
  found = joined.open_trees([str(both)])
  assert len(found.splits['train']) == 8
  assert found.class_names == ('ant', 'bee', 'cat')
  source = picture_set.PictureSource(found, 'train')
  # 9.png was the first of the second list.
  np.testing.assert_array_equal(
    source[4]['image'], np.asarray(trees.picture(0))
  )


def test_the_last_of_equal_names_counts_and_is_noted(tmp_path):
  path = tmp_path / 'a.tar'
  with tarfile.open(path, 'w') as archive:
    for i in (0, 1, 2):
      add(archive, f'{i % 2}.png', trees.png(i))
  found = joined.open_trees([str(path)])
  names = [part.names[i] for part in found.splits.values()
           for i in range(len(part))]  # fmt: skip
  assert sorted(names) == ['0.png', '1.png']
  assert any(note.startswith('1 names come several') for note in found.notes)
  source = tars.reader_maker(str(path))(
    [tars.list_tar(str(path)).files['0.png']]
  )
  assert source(0) == trees.png(2)


def test_a_sparse_file_is_named(tmp_path):
  path = tmp_path / 'sparse.tar'
  with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as archive:
    member = tarfile.TarInfo('a.png')
    member.pax_headers = {
      'GNU.sparse.major': '1',
      'GNU.sparse.minor': '0',
      'GNU.sparse.name': 'a.png',
      'GNU.sparse.realsize': '5000',
    }
    data = b'1\n0\n5\n'.ljust(512, b'\0') + b'hello'
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
  with pytest.raises(errors.DataError, match='without --sparse'):
    tars.list_tar(str(path))


def test_tars_beside_pictures_are_left_out(tmp_path):
  root = trees.write(tmp_path / 'photos', *(f'cat/{i}.png' for i in range(20)))
  trees.pack(root, tmp_path / 'cat.tar')
  (tmp_path / 'cat.tar').rename(root / 'cat.tar')
  for path in (root, trees.pack(root, tmp_path / 'all.tar')):
    found = joined.open_trees([str(path)])
    assert sum(len(part) for part in found.splits.values()) == 20
    assert found.skipped == {'.tar': 1}


def test_a_tar_in_a_tar_is_a_folder(tmp_path):
  path = tmp_path / 'ILSVRC2012_img_train.tar'
  with tarfile.open(path, 'w') as archive:
    for number, synset in enumerate(('n01443537', 'n01440764')):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as part:
        for i in range(20):
          add(part, f'{synset}_{i}.JPEG', trees.png(number * 100 + i))
      add(archive, f'{synset}.tar', inner.getvalue())
  # As downloaded, and with the first of its tars unpacked.
  folder = tmp_path / 'unpacked'
  with tarfile.open(path) as archive:
    archive.extractall(folder, filter='data')
  prints = set()
  for place in (path, folder):
    found = sources.open_pictures(place)
    assert found.class_names == ('n01440764', 'n01443537')
    assert sum(len(part) for part in found.splits.values()) == 40
    source = pickle.loads(
      pickle.dumps(picture_set.PictureSource(found, 'train'))
    )
    seed = 100 + int(source.name(0).split('_')[-1].split('.')[0])
    np.testing.assert_array_equal(
      source[0]['image'], np.asarray(trees.picture(seed))
    )
    prints.add(source.fingerprint)
  assert len(prints) == 1
  cut = folder / 'n01440764.tar'
  cut.write_bytes(cut.read_bytes()[:700])
  with pytest.raises(
    errors.DataError, match=r'n01440764\.tar is no tar, or is'
  ):
    sources.open_pictures(folder)


def _cut_inner(data):
  """A tar whose only member is a tar that is cut in its second half."""
  outer = io.BytesIO()
  with tarfile.open(fileobj=outer, mode='w') as archive:
    add(archive, 'n01440764.tar', data[: len(data) * 2 // 3])
  return outer.getvalue()


def _spoil(data, number):
  """A tar with a header that is none in its middle."""
  with tarfile.open(fileobj=io.BytesIO(data)) as archive:
    at = archive.getmembers()[number].offset
  return data[:at] + bytes([255] * 512) + data[at + 512 :]


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (lambda data: data[: len(data) // 2], 'cut short'),
    (lambda data: data[:700], 'cut short'),
    (lambda data: _spoil(data, 6), 'no tar'),
    (lambda data: data + b'rubbish' * 200, 'no tar'),
    (lambda data: b'', 'no tar'),
    (_cut_inner, 'cut short'),
  ],
)
def test_damaged_tars_are_refused(tar, damage, message):
  tar.write_bytes(damage(tar.read_bytes()))
  with pytest.raises(errors.DataError, match=message) as caught:
    tars.list_tar(str(tar))
  assert '\n' not in str(caught.value)


def _grow(rng, root: pathlib.Path) -> None:
  """Writes a random tree: folders, pictures, other files, links."""
  places = [root]
  for number in range(rng.integers(3, 25)):
    where = places[rng.integers(len(places))]
    name = f'{"abcdeT"[rng.integers(6)]}{rng.integers(4)}'
    kind = rng.integers(10)
    if kind < 3 and not (where / name).exists():
      (where / name).mkdir()
      places.append(where / name)
    elif kind < 8:
      suffix = ('.png', '.PNG', '.txt', '')[min(rng.integers(9), 3)]
      file = where / f'{name}{suffix}'
      if not os.path.lexists(file):
        file.write_bytes(trees.png(number) if rng.integers(20) else b'')
    else:
      target = places[rng.integers(len(places))]
      link = where / name
      if kind == 9:
        target = target / f'{"abcde"[rng.integers(5)]}{rng.integers(4)}.png'
        link = link.with_suffix('.png')
      if not os.path.lexists(link):
        link.symlink_to(os.path.relpath(target, where))
  if rng.integers(2):
    pictures = sorted(root.rglob('*.png'))
    if pictures and not pictures[0].is_symlink():
      os.link(pictures[0], root / 'hard.png')


def _describe(path):
  try:
    found = joined.open_trees([str(path)])
  except errors.DataError as error:
    return str(error).replace(str(path), 'PATH')
  parts = [
    (
      list(part.names),
      part.labels.tolist(),
      [part.read(i) for i in range(len(part))],
      part.digest,
      part.fingerprint if len(part) else '',
    )
    for part in found.splits.values()
  ]
  bad = sorted(item.path for item in found.bad)
  return parts, found.class_names, dict(found.skipped), found.notes, bad


def test_a_folder_and_a_tar_of_it_are_the_same(tmp_path):
  rng = np.random.default_rng(0)
  outcomes = set()
  for round_ in range(120):
    root = tmp_path / f'{round_}'
    if rng.integers(2):
      root.mkdir()
      _grow(rng, root)
    else:
      for split in ('train', 'val'):
        (root / split).mkdir(parents=True)
        _grow(rng, root / split)
    if rng.integers(3) == 0:
      # Class folders as a tar each, perhaps of tars again.
      for folder in [entry for entry in root.iterdir() if entry.is_dir()]:
        if not folder.is_symlink():
          trees.pack(folder, folder.with_name(f'{folder.name}.tar'))
          shutil.rmtree(folder)
    tar = trees.pack(root, tmp_path / 'tree.tar')
    folder, packed = _describe(root), _describe(tar)
    assert folder == packed, round_
    outcomes.add(type(folder))
    shutil.rmtree(root)
  # Some trees are refused, in the same words.
  assert outcomes == {str, tuple}
