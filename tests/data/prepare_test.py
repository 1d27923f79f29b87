import errno
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import data, errors
from selfboottok_jax.data import prepare, records
from tests.data import trees

NAMES = [
  f'{split}/{kind}/{i:02}.png'
  for split, count in (('train', 20), ('val', 5))
  for kind in ('cat', 'bee')
  for i in range(count)
]
DAMAGES = {
  'train/bee/03.png': b'',
  'train/cat/07.png': b'<html>404</html>',
  'val/cat/01.png': trees.png(1)[:60],
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
  monkeypatch.setattr(prepare, 'SHARD_IMAGES', 7)


@pytest.fixture
def folder(tmp_path):
  return trees.write(tmp_path / 'photos', *NAMES)


@pytest.fixture
def salted(folder):
  for name, content in DAMAGES.items():
    (folder / name).write_bytes(content)
  (folder / 'notes.heic2').write_bytes(b'x')
  return folder


def run(path, out, **options):
  settings = options.pop('settings', prepare.Settings())
  found = data.open_pictures(path)
  return prepare.prepare(found, str(out), settings, **options)


def contents(folder):
  return {
    str(file.relative_to(folder)): file.read_bytes()
    for file in sorted(folder.rglob('*'))
    if file.is_file()
  }


def test_the_report_lists_what_is_bad(salted):
  report = prepare.check(data.open_pictures(salted))
  assert set(report) == {'splits', 'bad', 'skipped', 'notes', 'fingerprint'}
  assert {item['path'] for item in report['bad']} == set(DAMAGES)
  reasons = {item['path']: item['reason'] for item in report['bad']}
  assert reasons['train/bee/03.png'] == 'the file is empty'
  assert '404' in reasons['train/cat/07.png']
  assert report['splits'] == {
    'train': {'images': 38, 'classes': {'bee': 19, 'cat': 19}},
    'val': {'images': 9, 'classes': {'bee': 5, 'cat': 4}},
  }
  assert report['skipped'] == {'.heic2': 1}
  assert report['notes'] == ['train/ and val/ are the splits']
  json.dumps(report)


def test_bad_pictures_are_an_error_until_they_are_skipped(salted, tmp_path):
  out = tmp_path / 'out'
  with pytest.raises(errors.DataError, match='3 of 50 images.*--skip_bad'):
    run(salted, out, most_bad=0.1)
  assert not (out / records.INDEX).exists()
  with pytest.raises(errors.DataError, match='more than --most_bad=0.01'):
    run(salted, tmp_path / 'other', skip_bad=True)
  report = run(salted, out, skip_bad=True, most_bad=0.1)
  assert {item['path'] for item in report['bad']} == set(DAMAGES)
  found = data.open_pictures(out)
  assert [len(part) for part in found.splits.values()] == [38, 9]
  assert '3 unreadable images were left out' in found.notes[0]
  assert found.skipped == {'.heic2': 1}
  for split in ('train', 'val'):
    source = data.PictureSource(found, split)
    for i in range(len(source)):
      name = source.name(i).removeprefix(f'{out}/')
      image = np.asarray(trees.picture(NAMES.index(name)))
      np.testing.assert_array_equal(source[i]['image'], image)
  # What was left out is no reason for another fingerprint than that of the
  # same pictures in a folder.
  for name in DAMAGES:
    (salted / name).unlink()
  assert data.open_pictures(salted).fingerprint == found.fingerprint


@pytest.mark.slow
def test_processes_do_not_change_the_files(salted, tmp_path):
  run(salted, tmp_path / 'one', skip_bad=True, most_bad=1)
  run(salted, tmp_path / 'two', skip_bad=True, most_bad=1, num_workers=2)
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')
  one = prepare.check(data.open_pictures(salted))
  assert prepare.check(data.open_pictures(salted), num_workers=2) == one


def test_a_stopped_preparation_continues(folder, tmp_path, monkeypatch):
  run(folder, tmp_path / 'whole')
  done = prepare._Worker._write
  calls = []

  def stop(self, task):
    calls.append(task.file)
    if len(calls) in (3, 5):
      raise KeyboardInterrupt
    return done(self, task)

  monkeypatch.setattr(prepare._Worker, '_write', stop)
  out = tmp_path / 'out'
  for _ in range(2):
    with pytest.raises(KeyboardInterrupt):
      run(folder, out)
    # What a killed writer leaves.
    (out / f'.{calls[-1]}.1.partial').write_bytes(b'half')
  said = []
  run(folder, out, say=said.append)
  assert contents(out) == contents(tmp_path / 'whole')
  # Each shard was written once.
  assert len(calls) == 8 + 2
  assert '3 of 8 shards are there already' in said[0]
  assert '.progress' not in os.listdir(out)
  run(folder, out, say=said.append)
  assert said[-1] == f'{out} is complete'


def test_a_shard_that_was_damaged_meanwhile_is_made_again(
  folder, tmp_path, monkeypatch
):
  run(folder, tmp_path / 'whole')
  finish = prepare._finish
  monkeypatch.setattr(prepare, '_finish', lambda *a: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run(folder, tmp_path / 'out')
  monkeypatch.setattr(prepare, '_finish', finish)
  file = tmp_path / 'out' / 'train-00000-of-00006.array_record'
  file.write_bytes(file.read_bytes()[:-100])
  (tmp_path / 'out' / 'train-00001-of-00006.array_record').unlink()
  run(folder, tmp_path / 'out')
  assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_other_folders_are_left_alone(folder, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').write_text('x')
  with pytest.raises(errors.DataError, match='is not empty'):
    run(folder, tmp_path / 'mine')
  assert os.listdir(tmp_path / 'mine') == ['thesis.tex']
  run(folder, tmp_path / 'out')
  with pytest.raises(errors.DataError, match='other images or settings'):
    run(folder, tmp_path / 'out', settings=prepare.Settings(resize=8))
  (folder / 'train/cat/00.png').unlink()
  with pytest.raises(errors.DataError, match='other images or settings'):
    run(folder, tmp_path / 'out')


def test_large_pictures_are_resized_and_turned(tmp_path):
  root = tmp_path / 'photos'
  for i in range(40):
    file = root / f'a/{i}.jpg'
    file.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x112] = 6
    size = (90, 60) if i % 2 else (20, 12)
    Image.new('RGB', size, (i, 99, 200)).save(file, exif=exif)
  run(root, tmp_path / 'out', settings=prepare.Settings(resize=30))
  found = data.open_pictures(tmp_path / 'out')
  source = data.PictureSource(found, 'train')
  shapes = set()
  for i in range(len(source)):
    image, number = source[i]['image'], int(source.name(i)[:-4].split('/')[-1])
    shapes.add(image.shape[:2])
    assert image.shape[:2] == ((45, 30) if number % 2 else (20, 12))
    assert np.abs(image.astype(int) - (number, 99, 200)).max() < 4
  assert shapes == {(45, 30), (20, 12)}
  assert found.fingerprint != data.open_pictures(root).fingerprint


def test_a_full_disk_is_named(folder, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(
    prepare.shutil, 'disk_usage', lambda path: usage._replace(free=1000)
  )
  with pytest.raises(errors.DataError, match='would take .* GB free'):
    run(folder, tmp_path / 'out')
  monkeypatch.undo()

  def fail(*unused, **options):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(prepare.os, 'replace', fail)
  with pytest.raises(errors.DataError, match='No space left') as caught:
    run(folder, tmp_path / 'out')
  assert '\n' not in str(caught.value)
  monkeypatch.undo()
  run(folder, tmp_path / 'out')


@pytest.mark.parametrize('field', ['resize', 'quality'])
def test_impossible_settings_are_refused(folder, tmp_path, field):
  settings = prepare.Settings(**{field: -1})
  with pytest.raises(errors.ConfigError, match=f'--{field}=-1'):
    run(folder, tmp_path / 'out', settings=settings)
  assert not (tmp_path / 'out').exists()


def test_a_split_may_be_empty(tmp_path):
  root = trees.write(tmp_path / 'photos', 'train/a/1.png', 'train/b/2.png')
  (root / 'val').mkdir()
  report = run(root, tmp_path / 'out')
  assert report['splits']['val']['images'] == 0
  found = data.open_pictures(tmp_path / 'out')
  assert [len(part) for part in found.splits.values()] == [2, 0]
  assert any('no val images' in note for note in found.notes)


def test_the_report_is_the_same_when_it_is_asked_for_again(salted, tmp_path):
  options = {'skip_bad': True, 'most_bad': 0.5}
  first = run(salted, tmp_path / 'out', **options)
  assert run(salted, tmp_path / 'out', **options) == first
  found = data.open_pictures(tmp_path / 'out')
  assert first['fingerprint'] == found.fingerprint
  with pytest.raises(prepare.BadPicturesError) as caught:
    run(salted, tmp_path / 'other', most_bad=0.5)
  assert caught.value.report['bad'] == first['bad']


def test_a_check_compares_hashes(folder, tmp_path):
  run(folder, tmp_path / 'out')
  assert not prepare.check(data.open_pictures(tmp_path / 'out'))['bad']
  shard = tmp_path / 'out' / 'val-00000-of-00002.array_record'
  content = bytearray(shard.read_bytes())
  # In the padding, which no reader looks at.
  content[-1] ^= 1
  shard.write_bytes(content)
  (bad,) = prepare.check(data.open_pictures(tmp_path / 'out'))['bad']
  assert bad['path'] == shard.name
  assert 'sha256' in bad['reason']
