import io
import json
import signal
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import data
from selfboottok_jax.data import records
from tests.launch import commands, pictures


def _jpeg(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, 'JPEG')
  return buffer.getvalue()


def _add(archive, name, content):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  archive.addfile(info, io.BytesIO(content))


SYNSETS = ('n01443537', 'n01440764', 'n01484850')


@pytest.fixture
def imagenet(tmp_path):
  """ILSVRC 2012 as it is downloaded, of three classes."""
  train = tmp_path / 'ILSVRC2012_img_train.tar'
  with tarfile.open(train, 'w') as archive:
    for number, synset in enumerate(SYNSETS):
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode='w') as part:
        for i in range(6):
          _add(part, f'{synset}_{i}.JPEG', _jpeg(10 * number + i))
      _add(archive, f'{synset}.tar', inner.getvalue())
  val = tmp_path / 'ILSVRC2012_img_val.tar'
  with tarfile.open(val, 'w') as archive:
    for i in range(9):
      _add(archive, f'ILSVRC2012_val_{i + 1:08}.JPEG', _jpeg(100 + i))
  rows = [f'ILSVRC2012_val_{i + 1:08},{SYNSETS[i % 3]} 1 2 3 4'
          for i in range(9)]  # fmt: skip
  solution = tmp_path / 'LOC_val_solution.csv'
  solution.write_text('\n'.join(['ImageId,PredictionString', *rows]))
  return f'--path={train},{val}', f'--labels={solution}'


def test_imagenet_as_it_is_downloaded(server, imagenet, tmp_path):
  report = tmp_path / 'report.json'
  result = server.run('prepare', *imagenet, '--check', f'--report={report}')
  assert result.code == 0, result.err
  names = ['n01440764', 'n01443537', 'n01484850']
  assert json.loads(report.read_text())['splits'] == {
    'train': {'images': 18, 'classes': dict.fromkeys(names, 6)},
    'val': {'images': 9, 'classes': dict.fromkeys(names, 3)},
  }
  assert '18 train, 9 val images can be read, 0 cannot' in result.out
  out = tmp_path / 'imagenet'
  result = server.run('prepare', *imagenet, f'--out={out}', '--num_workers=1')
  assert result.code == 0, result.err
  index = json.loads((out / records.INDEX).read_text())
  assert index['class_names'] == names
  assert index['readable_names'] == ['tench', 'goldfish', 'great white shark']
  found = data.open_pictures(out)
  assert found.splits['val'].labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
  assert any("3 of ImageNet's 1,000 synsets" in note for note in found.notes)


@pytest.mark.slow
def test_a_generator_of_imagenet_is_asked_for_a_class_by_name(
  server, imagenet, runs, tmp_path
):
  out = tmp_path / 'imagenet'
  result = server.run('prepare', *imagenet, f'--out={out}', '--num_workers=1')
  assert result.code == 0, result.err
  photos = ('--config.data.source=auto', f'--config.data.path={out}')
  tiny = '--config=tests/launch/tiny.py'
  result = server.run(
    'train', f'{tiny}:generator', *photos, f'--workdir={tmp_path / "gen"}',
    f'--config.tokenizer={runs / "tokenizer"}',
  )  # fmt: skip
  assert result.code == 0, result.err
  log = result.err.splitlines()
  assert log[0].startswith('data: 18 train, 9 val images, 3 classes')
  assert log[1].startswith('split: train/ and val/ are the splits')
  assert log[2] == 'skipped: nothing'
  sample = (
    'sample', f'--workdir={tmp_path / "gen"}', '--num_samples=2',
    f'--tokenizer={runs / "tokenizer"}', f'--out={tmp_path / "samples"}',
  )  # fmt: skip
  result = server.run(*sample, '--labels=tench')
  assert result.code == 0, result.err
  names = {file.name for file in (tmp_path / 'samples' / 'images').iterdir()}
  assert names == {'000000_class0000.png', '000001_class0000.png'}
  assert "'tnch' is no class" in server.run(*sample, '--labels=tnch').error


def test_bad_pictures_are_listed_and_skipped(server, tmp_path):
  photos, out = tmp_path / 'photos', tmp_path / 'out'
  for name in ('train/a', 'train/b', 'val/a', 'val/b'):
    pictures.write(photos / name, 8)
  pictures.truncate(photos / 'train/a/3.jpg')
  (photos / 'train/b/1.jpg').write_bytes(b'<html>')
  command = ('prepare', f'--path={photos}')
  result = server.run(*command, '--check', '--num_workers=1')
  assert result.code == 0, result.err
  assert 'train/a/3.jpg: ' in result.out
  assert 'train/b/1.jpg: it is of no known format' in result.out
  # Nothing else was written.
  assert list(tmp_path.iterdir()) == [photos]
  make = (*command, f'--out={out}', '--num_workers=1')
  assert '2 of 32 images cannot be read, more than' in server.run(*make).error
  error = server.run(*make, '--most_bad=0.5').error
  assert '2 of 32 images cannot be read, such as train/a/3.jpg' in error
  report = tmp_path / 'report.json'
  result = server.run(
    *make, '--most_bad=0.5', '--skip_bad', f'--report={report}'
  )
  assert result.code == 0, result.err
  bad = [item['path'] for item in json.loads(report.read_text())['bad']]
  assert bad == ['train/a/3.jpg', 'train/b/1.jpg']
  assert len(data.open_pictures(out).splits['train']) == 14


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--check'], '--path not given'),
    (['--path=x'], 'wanted --check, or --out=FOLDER'),
    (['--path=x', '--check', '--out=y'], 'wanted --check, or --out=FOLDER'),
    (['--path=nowhere', '--check'], 'nowhere does not exist'),
    (['--path=x', '--check', '--num_workers=-1'], '--num_workers=-1'),
    (['--path=x', '--check', '--most_bad=2.0'], 'wanted 0 to 1'),
    (['--path=x', '--out=y', '--resize=-3'], '--resize=-3; wanted 0 to'),
    (['--path=x', '--check', '--source=zip'], "unknown data source 'zip'"),
  ],
)  # fmt: skip
def test_wrong_flags_are_one_clear_line(server, arguments, message):
  assert message in server.run('prepare', *arguments).error


@pytest.mark.faults
def test_a_killed_preparation_continues(tmp_path):
  photos = tmp_path / 'photos'
  for i in range(30):
    for split in ('train', 'val'):
      pictures.write(photos / split / f'{i:02}', 60 if split == 'train' else 40)
  command = ('prepare', f'--path={photos}', '--num_workers=2')
  with commands.spawn(*command, f'--out={tmp_path / "whole"}') as process:
    out, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  codes = []
  for _ in range(2):
    with commands.spawn(*command, f'--out={tmp_path / "out"}') as process:
      shards = 0
      deadline = time.monotonic() + 300
      before = len(list((tmp_path / 'out').glob('*.array_record')))
      while shards <= before and process.poll() is None:
        shards = len(list((tmp_path / 'out').glob('*.array_record')))
        assert time.monotonic() < deadline
        time.sleep(0.002)
      process.kill()
    codes.append(process.returncode)
  # The second may have come to its end.
  assert codes[0] == -signal.SIGKILL
  assert codes[1] in (0, -signal.SIGKILL)
  with commands.spawn(*command, f'--out={tmp_path / "out"}') as process:
    out, error = process.communicate(timeout=300)
  assert process.returncode == 0, error
  assert 'are there already' in out or 'is complete' in out
  assert pictures.contents(tmp_path / 'out') == pictures.contents(
    tmp_path / 'whole'
  )
