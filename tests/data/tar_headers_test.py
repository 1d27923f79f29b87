import io
import os
import subprocess
import tarfile

import numpy as np
import pytest

from selfboottok_jax.data import tar_headers

FORMATS = {
  'ustar': tarfile.USTAR_FORMAT,
  'gnu': tarfile.GNU_FORMAT,
  'pax': tarfile.PAX_FORMAT,
}
FIELDS = ('name', 'type', 'size', 'linkname', 'offset_data')


def members(long):
  """Members of every kind, with names as long as a format has them."""
  rng = np.random.default_rng(0)
  for i in range(40):
    name = f'{"d" * int(rng.integers(1, long))}/{i}'
    data = bytes(int(rng.integers(0, 2000)))
    info = tarfile.TarInfo(name)
    info.size = len(data)
    # Seconds with a fraction make an extended header.
    info.mtime = 1.5 * (i % 2)
    yield info, data
  for name, kind, link in (
    ('folder', tarfile.DIRTYPE, ''),
    ('hard', tarfile.LNKTYPE, 'd/0'),
    ('symbolic', tarfile.SYMTYPE, '../' + 'e' * (long - 10)),
    ('fifo', tarfile.FIFOTYPE, ''),
    ('ø\udcff', tarfile.REGTYPE, ''),
  ):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    yield info, b''


def pack(path, kind, long=90, mode='w', **options):
  with tarfile.open(path, mode, format=FORMATS[kind], **options) as tar:
    for info, data in members(long):
      tar.addfile(info, io.BytesIO(data))
  return path


def walk(path, start=0, end=None):
  with open(path, 'rb') as file:
    found = tar_headers.walk(file, start, end or os.path.getsize(path))
    return [tuple(getattr(m, field) for field in FIELDS) for m in found]


def reference(path):
  with tarfile.open(path) as tar:
    return [tuple(getattr(m, field) for field in FIELDS) for m in tar]


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('long', [90, 300])
def test_members_are_those_of_tarfile(tmp_path, kind, long):
  if kind == 'ustar' and long > 90:
    pytest.skip('ustar has no such names')
  path = pack(tmp_path / 'a.tar', kind, long)
  assert walk(path) == reference(path)
  assert len(walk(path)) == 45


@pytest.mark.parametrize('kind', ['gnu', 'pax', 'ustar', 'v7', 'oldgnu'])
def test_members_are_those_of_gnu_tar(tmp_path, kind):
  for i in range(4):
    # Longer than a field of names, and split between two by ustar.
    file = tmp_path / 'tree' / ('x' * (90 if kind == 'v7' else 60)) / f'{i}.jpg'
    if kind not in ('v7', 'oldgnu'):
      file = file.parent / ('y' * 60) / file.name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(700 * i))
  path = tmp_path / 'a.tar'
  subprocess.run(
    ['tar', f'--format={kind}', '-C', tmp_path / 'tree', '-cf', path, '.'],
    check=True,
    capture_output=True,
  )
  assert walk(path) == reference(path)


def test_the_usual_kinds_are_not_left_to_tarfile(tmp_path, monkeypatch):
  left = []
  original = tar_headers._read_other
  monkeypatch.setattr(
    tar_headers,
    '_read_other',
    lambda *args: left.append(args[1]) or original(*args),
  )
  for kind in FORMATS:
    path = pack(tmp_path / 'a.tar', kind)
    assert len(walk(path)) == 45
    # The pipe, the end and, in pax, the name that is no text.
    assert len(left) == 2 + (kind == 'pax')
    left.clear()


def test_other_kinds_are_left_to_tarfile(tmp_path):
  path = tmp_path / 'a.tar'
  with tarfile.open(
    path, 'w', format=tarfile.PAX_FORMAT, pax_headers={'comment': 'all'}
  ) as tar:
    large = tarfile.TarInfo('large')
    large.size = 3
    large.pax_headers = {'SCHILY.xattr.user': 'x'}
    tar.addfile(large, io.BytesIO(b'abc'))
  sized = tmp_path / 'b.tar'
  with tarfile.open(sized, 'w', format=tarfile.GNU_FORMAT) as tar:
    info = tarfile.TarInfo('owner beyond octal numbers')
    info.uid, info.size = 2**40, 5
    tar.addfile(info, io.BytesIO(b'abcde'))
  for each in (path, sized):
    assert walk(each) == reference(each)


def test_tars_that_follow_each_other_and_tars_inside_are_read(tmp_path):
  one = pack(tmp_path / 'a.tar', 'gnu')
  two = pack(tmp_path / 'b.tar', 'ustar')
  both = tmp_path / 'both.tar'
  both.write_bytes(one.read_bytes() + two.read_bytes())
  size = one.stat().st_size
  found = walk(both)
  assert found[:45] == reference(one)
  assert found[45:] == [(*m[:4], m[4] + size) for m in reference(two)]
  assert walk(both, size) == found[45:]
  assert walk(both, 0, size) == found[:45]


@pytest.mark.parametrize('at', [0, 512])
def test_a_damaged_header_is_an_error(tmp_path, at):
  path = tmp_path / 'a.tar'
  with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
    for name in 'abc':
      tar.addfile(tarfile.TarInfo(name))
  data = bytearray(path.read_bytes())
  data[at + 5] ^= 1
  path.write_bytes(data)
  with pytest.raises(tarfile.TarError):
    walk(path)


def test_what_is_no_tar_is_an_error(tmp_path):
  path = tmp_path / 'a.tar'
  path.write_bytes(b'no tar' * 1000)
  with pytest.raises(tarfile.TarError):
    walk(path)


def test_a_tar_cut_inside_a_header_is_an_error(tmp_path):
  path = pack(tmp_path / 'a.tar', 'ustar')
  offset = reference(path)[20][4]
  os.truncate(path, offset - 200)
  with pytest.raises(tarfile.TarError):
    walk(path)
