import json
import os
import time

import numpy as np
import pytest
from PIL import Image

from tests.launch import commands


def _arguments(runs, out, *more):
  return (
    f'--workdir={runs / "generator"}',
    f'--tokenizer={runs / "scaled"}',
    f'--out={out}',
    *more,
  )


def _sample(server, runs, out, *more, **variables):
  result = server.run('sample', *_arguments(runs, out, *more), **variables)
  assert result.code == 0, result.err
  return result


def _pixels(file):
  with Image.open(file) as image:
    return np.asarray(image)


def _names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_writes_numbered_images_and_grids(server, runs, tmp_path):
  out = tmp_path / 'deep' / 'samples'
  result = _sample(
    server, runs, out, '--num_samples=5', '--batch_size=2', '--labels=7,3'
  )
  assert _names(out) == ['grid.png', 'grids', 'images', 'sampling.json']
  assert _names(out / 'images') == [
    '000000_class0007.png',
    '000001_class0003.png',
    '000002_class0007.png',
    '000003_class0003.png',
    '000004_class0007.png',
  ]
  assert [name[:9] for name in _names(out / 'grids')] == [
    'class0003',
    'class0007',
  ]
  assert f'5 samples in {out}' in result.out
  images = [_pixels(file) for file in sorted((out / 'images').iterdir())]
  assert all(image.shape == (16, 16, 3) for image in images)
  assert not np.array_equal(images[0], images[2])
  record = json.loads((out / 'sampling.json').read_text())
  assert record['labels'] == '7,3'
  assert record['sampler'] == 'sde'


@pytest.mark.slow
def test_the_same_files_on_any_number_of_devices(server, runs, tmp_path):
  for devices, size in ((1, 32), (2, 5), (8, 1)):
    count = f'--xla_force_host_platform_device_count={devices}'
    _sample(
      server,
      runs,
      tmp_path / str(devices),
      '--num_samples=9',
      f'--batch_size={size}',
      '--labels=random',
      XLA_FLAGS=f'{os.environ["XLA_FLAGS"]} {count}',
    )
  one = tmp_path / '1'
  assert len(_names(one / 'images')) == 9
  for other in (tmp_path / '2', tmp_path / '8'):
    for path in one.rglob('*'):
      if path.is_file():
        same = other / path.relative_to(one)
        assert same.read_bytes() == path.read_bytes(), same


@pytest.mark.slow
def test_a_longer_random_set_begins_with_the_shorter_one(
  server, runs, tmp_path
):
  for count in (3, 6):
    _sample(
      server,
      runs,
      tmp_path / str(count),
      f'--num_samples={count}',
      '--labels=random',
    )
  short, long = (tmp_path / n / 'images' for n in ('3', '6'))
  assert set(_names(short)) < set(_names(long))
  for name in _names(short):
    assert (short / name).read_bytes() == (long / name).read_bytes()


def _start(runs, out, *more):
  return commands.spawn('sample', *_arguments(runs, out, *more))


@pytest.mark.faults
@pytest.mark.parametrize('interrupt', ['kill', 'terminate'])
def test_a_stopped_folder_ends_like_an_unbroken_one(
  server, runs, tmp_path, interrupt
):
  settings = ('--num_samples=40', '--npz', '--num_steps=40', '--batch_size=4')
  whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
  _sample(server, runs, whole, *settings)
  with _start(runs, stopped, *settings) as process:
    while not list((stopped / 'parts').glob('0*')):
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.01)
    getattr(process, interrupt)()
  assert process.returncode
  assert not (stopped / 'samples.npz').exists()
  # Another batch size: what is there is known by its index.
  result = _sample(server, runs, stopped, *settings[:-1], '--batch_size=7')
  assert 'of them now' in result.out
  assert _names(whole / 'images') == _names(stopped / 'images')
  with (
    np.load(whole / 'samples.npz') as one,
    np.load(stopped / 'samples.npz') as two,
  ):
    np.testing.assert_array_equal(one['arr_0'], two['arr_0'])
    np.testing.assert_array_equal(one['arr_1'], two['arr_1'])
  before = (stopped / 'samples.npz').stat().st_mtime_ns
  result = _sample(server, runs, stopped, *settings)
  assert f'40 samples are in {stopped} already' in result.out
  assert (stopped / 'samples.npz').stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_sweep_has_a_folder_for_each_setting(server, runs, tmp_path):
  _sample(
    server,
    runs,
    tmp_path,
    '--num_samples=2',
    '--nopng',
    '--npz',
    '--sampler=heun',
    '--num_steps=2',
    '--guidance_scale=1,2,3',
    '--guidance_high=0.5,1',
  )
  assert _names(tmp_path) == [
    'scale2_t0-0.5',
    'scale2_t0-1',
    'scale3_t0-0.5',
    'scale3_t0-1',
    'unguided',
  ]
  for folder in tmp_path.iterdir():
    assert _names(folder) == [
      'grid.png',
      'grids',
      'samples.npz',
      'sampling.json',
    ]
  record = json.loads((tmp_path / 'scale3_t0-1' / 'sampling.json').read_text())
  assert record['guidance_scale'] == 3.0
  assert record['guidance_high'] == 1.0


@pytest.mark.slow
def test_two_processes_share_a_folder(server, runs, tmp_path):
  settings = ('--num_samples=11', '--npz', '--batch_size=3')
  _sample(server, runs, tmp_path / 'one', *settings)
  commands.run_together(
    'sample', *_arguments(runs, tmp_path / 'two', *settings)
  )
  with (
    np.load(tmp_path / 'one' / 'samples.npz') as one,
    np.load(tmp_path / 'two' / 'samples.npz') as two,
  ):
    np.testing.assert_array_equal(one['arr_0'], two['arr_0'])


@pytest.mark.slow
@pytest.mark.parametrize('wrong', [0, 1])
def test_what_one_process_refuses_ends_all(server, runs, tmp_path, wrong):
  out = tmp_path / 'out'
  _sample(server, runs, out, '--num_samples=2')
  seeds = ['--seed=0', '--seed=0']
  seeds[wrong] = '--seed=1'
  results = commands.run_joined(
    'sample',
    *(list(_arguments(runs, out, '--num_samples=2', seed)) for seed in seeds),
  )
  assert 'holds other samples (seed: 0 there, 1 given)' in results[wrong].error
  assert f'process {wrong} of 2 cannot go on' in results[1 - wrong].error


@pytest.mark.slow
def test_processes_of_different_seeds_make_nothing(runs, tmp_path):
  out = tmp_path / 'out'
  results = commands.run_joined(
    'sample',
    *(
      list(_arguments(runs, out, '--num_samples=2', f'--seed={seed}'))
      for seed in range(2)
    ),
  )
  for result in results:
    assert 'the processes have different samples to make' in result.error
  assert not out.exists()
