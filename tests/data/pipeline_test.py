import contextlib
import hashlib
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pytest

from selfboottok_jax import data, errors, pixels
from selfboottok_jax.data import pipeline
from tests.data import caches, takes, trees


@pytest.fixture(scope='module')
def cached(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cache')
  caches.write(folder)
  return data.open_token_cache(folder, 'train')


def _train(source, **options):
  options = {'max_scale': None, 'flip': True, 'random_crop': False} | options
  return pipeline.train_rows(source, caches.SIZE, **options)


@pytest.mark.parametrize('flip', [True, False])
def test_a_cache_is_mirrored_where_its_images_are(flip, cached):
  images = caches.images()
  mirrored = 0
  for seed in range(40):
    online = _train(images, flip=flip)(seed, np.random.default_rng(seed))
    offline = _train(cached, flip=flip)(seed, np.random.default_rng(seed))
    assert set(offline) == {*caches.SHAPES, 'label'}
    np.testing.assert_array_equal(
      offline['codes'].reshape(online['image'].shape),
      pixels.to_float(online['image']),
    )
    assert offline['label'] == online['label']
    mirrored += (offline['codes'] != cached[seed]['codes'][0]).any()
  assert 10 < mirrored < 30 if flip else not mirrored


def test_pictures_are_scaled_as_told_or_as_the_source_says():
  source = caches.images()
  assert _train(source).transform.max_scale == 1.0
  assert _train(source, max_scale=1.5).transform.max_scale == 1.5


def test_evaluation_sees_images_as_they_are_and_pads_with_zeros(cached):
  for source, wanted in (
    (caches.images(), caches.images()[7]['image']),
    (cached, cached[7]['codes'][0]),
  ):
    read = pipeline.eval_rows(source, caches.SIZE)
    row, blank = read(7), read.blank()
    name = 'codes' if source is cached else 'image'
    np.testing.assert_array_equal(row[name], wanted)
    assert row.keys() == blank.keys()
    for key, value in blank.items():
      assert not value.any()
      assert value.dtype == row[key].dtype
      assert value.shape == row[key].shape


def test_a_cache_that_does_not_fit_is_refused(cached):
  with pytest.raises(errors.ConfigError, match='random_crop=False'):
    _train(cached, random_crop=True)
  with pytest.raises(errors.ConfigError, match='image_size=8'):
    pipeline.eval_rows(cached, 16)


@pytest.fixture
def source():
  return data.ProceduralSource('train', 8, length=50)


class Numbered:
  """Pictures whose every pixel is their index."""

  class_names = ()
  fingerprint = ''
  max_scale = 1.0

  def __init__(self, length):
    self.length = length

  def __len__(self):
    return self.length

  def __getitem__(self, index):
    return {'image': np.full((4, 4, 3), index, np.uint8), 'label': index}


def assert_same(one, two):
  assert len(one) == len(two)
  for a, b in zip(one, two, strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_contracted_form(source):
  (batch,) = takes.take(source, 1)
  assert batch['image'].shape == (8, 8, 8, 3)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].dtype == np.int32


@pytest.mark.parametrize('num_threads', [0, 1, 3])
def test_a_run_goes_on_from_any_step(source, num_threads):
  # With scaling, so that augmentation is tested as well as order; 10 batches
  # of 8 pass the end of the epoch of 50.
  whole = takes.take(source, 10, max_scale=1.25)
  rest = takes.take(
    source, 3, start_step=7, num_threads=num_threads, max_scale=1.25
  )
  assert_same(whole[7:], rest)


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_together_see_the_global_batch(source, processes):
  whole = takes.take(source, 8, max_scale=1.25)
  parts = [
    takes.take(
      source,
      3,
      start_step=5,
      process_index=i,
      process_count=processes,
      max_scale=1.25,
    )
    for i in range(processes)
  ]
  for wanted, *shares in zip(whole[5:], *parts, strict=True):
    for key, value in wanted.items():
      joined = np.concatenate([share[key] for share in shares])
      np.testing.assert_array_equal(joined, value)


def test_the_order_is_that_of_grain():
  """Also that of runs that were begun when grain made every row."""
  length, seed, batch_size = 50, 3, 8
  order, augment = (
    int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])
    for purpose in (0, 1)
  )
  rows = (
    grain.MapDataset.range(length)
    .shuffle(seed=order)
    .repeat()
    .random_map(lambda index, rng: (index, rng.random()), seed=augment)
  )

  def draw(index, rng):
    return {'index': index, 'drawn': rng.random()}

  share = pipeline._Share(
    grain.MapDataset.range(length).shuffle(seed=order).repeat().batch(4),
    draw,
    augment,
    start_step=2,
    batch_size=batch_size,
    local=4,
    process_index=1,
  )
  for index in range(10):
    batch = share[index]
    first = (2 + index) * batch_size + 4
    wanted = [rows[i] for i in range(first, first + 4)]
    pairs = zip(batch['index'], batch['drawn'], strict=True)
    assert [(int(i), float(r)) for i, r in pairs] == wanted


BATCH, LENGTH = 8, 21


def _hosts(count, start_step, steps, **options):
  """Global batches, from the shares of so many hosts."""
  shares = [
    takes.take(
      data.ProceduralSource('train', 8, length=LENGTH),
      steps,
      batch_size=BATCH,
      start_step=start_step,
      process_index=i,
      process_count=count,
      max_scale=1.25,
      **options,
    )
    for i in range(count)
  ]
  return [
    {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    for parts in zip(*shares, strict=True)
  ]


@pytest.mark.parametrize('hosts', [1, 2, 4, 8])
def test_a_batch_is_decided_by_seed_and_step_alone(hosts):
  # Two epochs and more: 21 pictures are no multiple of 8.
  whole = _hosts(1, 0, 7, num_threads=0)
  # Stopped in the middle of an epoch on some hosts, continued on others.
  for start_step in (0, 1, 4):
    for threads in (0, 2):
      assert_same(
        whole[start_step:],
        _hosts(hosts, start_step, 7 - start_step, num_threads=threads),
      )


@pytest.mark.faults
@pytest.mark.parametrize(
  ('hosts', 'workers'),
  [(1, 1), (2, 1), (1, 4), pytest.param(4, 4, marks=pytest.mark.long)],
)
def test_workers_do_not_decide_a_batch(hosts, workers):
  whole = _hosts(1, 0, 7, num_threads=0)
  for start_step in (0, 4):
    assert_same(
      whole[start_step:],
      _hosts(hosts, start_step, 7 - start_step, num_workers=workers),
    )


def test_epochs_hold_every_picture_once_in_new_orders():
  options = {'batch_size': 5, 'image_size': 4}
  order = np.concatenate(
    [b['label'] for b in takes.take(Numbered(20), 12, **options)]
  ).reshape(3, 20)
  for epoch in order:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in order}) == 3
  # grain's own seeds would make this the second epoch of seed 0.
  other = takes.take(Numbered(20), 4, seed=1, **options)
  shifted = np.concatenate([b['label'] for b in other])
  assert tuple(shifted) not in {tuple(epoch) for epoch in order}


def test_augmentation_differs_between_epochs_and_seeds():
  source = data.ProceduralSource('train', 8, length=1)
  images = np.concatenate(
    [
      takes.take(source, 1, seed=seed, max_scale=2.0)[0]['image']
      for seed in (0, 1)
    ]
  )
  assert len({image.tobytes() for image in images}) > 12


def test_a_source_smaller_than_a_batch_is_repeated():
  (batch,) = takes.take(Numbered(3), 1, image_size=4)
  assert set(batch['label']) == {0, 1, 2}


def test_the_source_sets_the_scale_unless_told():
  source = data.ProceduralSource('train', 8, length=1)
  wanted = source[0]['image']
  (batch,) = takes.take(source, 1, flip=False)
  for actual in batch['image']:
    np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize('processes', [1, 2])
def test_evaluation_sees_every_picture_once(processes):
  seen = [[] for _ in range(processes)]
  for i in range(processes):
    batches = data.make_eval_dataset(
      Numbered(19), batch_size=8, image_size=4, process_index=i,
      process_count=processes,
    )  # fmt: skip
    assert len(batches) == 3
    for batch in batches:
      assert batch['image'].shape == (8 // processes, 4, 4, 3)
      assert batch['image'].dtype == np.uint8
      assert batch['label'].dtype == np.int32
      assert batch['mask'].dtype == np.bool_
      np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
      assert not batch['label'][~batch['mask']].any()
      seen[i].append((batch['label'], batch['mask']))
  labels, mask = np.concatenate(
    [np.stack(part) for step in zip(*seen, strict=True) for part in step],
    axis=1,
  )
  assert list(labels[mask.astype(bool)]) == list(range(19))


def test_rows_come_in_the_order_they_are_asked_for():
  batches = data.make_row_dataset(
    Numbered(20), np.array([7, -1, 3, 3, 19]), batch_size=2, image_size=4
  )
  labels, mask = (
    np.concatenate([batch[key] for batch in batches])
    for key in ('label', 'mask')
  )
  assert list(labels) == [7, 0, 3, 3, 19, 0]
  assert list(mask) == [True, False, True, True, True, False]


def test_evaluation_subsets_are_spread_and_can_be_read_again():
  def labels(count):
    batches = data.make_eval_dataset(
      Numbered(20), batch_size=4, image_size=4, num_images=count
    )
    once, twice = (
      np.concatenate([b['label'][b['mask']] for b in batches]) for _ in range(2)
    )
    np.testing.assert_array_equal(once, twice)
    return list(once)

  assert labels(5) == [0, 4, 8, 12, 16]
  assert labels(1000) == list(range(20))


def test_evaluation_threads_end_with_the_reader(source):
  before = threading.active_count()
  batches = data.make_eval_dataset(source, batch_size=4, image_size=8)
  for _ in batches:
    break
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before


@pytest.mark.parametrize('workers', [0, 1])
def test_damaged_pictures_surface_as_data_errors(tmp_path, workers):
  trees.write(tmp_path, 'train/0.png', 'train/1.png', 'val/0.png')
  (tmp_path / 'train' / '1.png').write_text('no image')
  (tmp_path / 'val' / '0.png').write_text('no image')
  source = data.open_source('auto', str(tmp_path), 'train', 8)
  with pytest.raises(errors.DataError, match='train/1.png is no image'):
    takes.take(source, 4, num_workers=workers)
  if not workers:
    source = data.open_source('auto', str(tmp_path), 'val', 8)
    batches = data.make_eval_dataset(source, batch_size=2, image_size=8)
    with pytest.raises(errors.DataError, match='val/0.png is no image'):
      list(batches)


def test_batches_that_do_not_divide_are_refused(source):
  for make in (
    lambda: takes.take(source, 1, process_count=3),
    lambda: data.make_eval_dataset(
      source, batch_size=8, image_size=8, process_count=3
    ),
  ):
    with pytest.raises(errors.ConfigError, match='give a multiple of 3'):
      make()


def test_closed_batches_end_and_close_again(source):
  before = threading.active_count()
  batches = data.make_train_dataset(source, batch_size=8, image_size=8, seed=0)
  next(batches)
  batches.close()
  batches.close()
  assert list(batches) == []
  deadline = time.monotonic() + 5
  while threading.active_count() > before and time.monotonic() < deadline:
    time.sleep(0.01)
  assert threading.active_count() <= before


_PROGRAM = """
import hashlib
from selfboottok_jax import data

if __name__ == '__main__':
  source = data.ProceduralSource('train', 8, length=50)
  # All are left open on purpose: the process must end cleanly all the same.
  runs = [
    data.make_train_dataset(
      source, batch_size=8, image_size=8, seed=0, start_step=2,
      num_workers=workers, max_scale=1.25)
    for workers in (0, 2)
  ]
  for run in runs:
    for _ in range(3):
      print(hashlib.sha256(next(run)['image'].tobytes()).hexdigest())
"""


def test_workers_change_nothing_and_processes_end(source, tmp_path):
  wanted = [
    hashlib.sha256(batch['image'].tobytes()).hexdigest()
    for batch in takes.take(source, 5, max_scale=1.25)[2:]
  ]
  program = tmp_path / 'program.py'
  program.write_text(_PROGRAM)
  root = str(pathlib.Path(data.__file__).parents[2])
  done = subprocess.run(
    [sys.executable, str(program)],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
    env=os.environ | {'PYTHONPATH': root},
  )
  assert done.stdout.split() == wanted * 2
  assert done.stderr == ''


def test_batches_tell_how_many_pictures_they_hold():
  source = data.ProceduralSource('val', 8)
  for count, processes in ((5, 1), (5, 2), (8, 2)):
    batches = data.make_eval_dataset(
      source,
      batch_size=4,
      image_size=8,
      num_images=count,
      process_count=processes,
    )
    assert batches.count == count


@pytest.mark.slow
def test_workers_outlive_an_interrupt_of_the_terminal(tmp_path):
  trees.write(tmp_path, *(f'train/{i}.png' for i in range(4)), 'val/0.png')
  source = data.open_source('auto', str(tmp_path), 'train', 8)
  batches = data.make_train_dataset(
    source, batch_size=2, image_size=8, seed=0, num_workers=1
  )
  with contextlib.closing(batches):
    next(batches)
    workers = multiprocessing.active_children()
    assert workers
    for worker in workers:
      os.kill(worker.pid, signal.SIGINT)
    # More than were prepared before.
    for _ in range(batches.ahead + 2):
      next(batches)
    assert all(worker.is_alive() for worker in workers)


@pytest.fixture
def salted(tmp_path):
  """Forty pictures, of which every seventh cannot be read."""
  folder = trees.write(
    tmp_path / 'photos', *(f'train/a/{i:02}.png' for i in range(40)),
    *(f'val/a/{i:02}.png' for i in range(9)),
  )  # fmt: skip
  for i in range(0, 40, 7):
    (folder / f'train/a/{i:02}.png').write_bytes(b'<html>')
  (folder / 'val/a/03.png').write_bytes(b'<html>')
  return str(folder)


@pytest.mark.parametrize('workers', [0, 2])
def test_pictures_that_cannot_be_read_are_skipped(salted, workers):
  source = data.open_source('auto', salted, 'train', 8)
  with pytest.raises(errors.DataError, match='is no image'):
    takes.take(source, 10)
  skipped = []
  options = {'skip_bad': True, 'on_skip': skipped.append}
  batches = takes.take(source, 15, num_workers=workers, **options)
  assert sorted(skipped) == list(range(0, 40, 7))
  assert all(set(batch) == {'image', 'label'} for batch in batches)
  # The others are where they would have been, and so are they after a restart.
  again = takes.take(source, 5, start_step=10, num_threads=1, **options)
  for one, two in zip(batches[10:], again, strict=True):
    np.testing.assert_array_equal(one['image'], two['image'])


def test_a_held_out_picture_that_cannot_be_read_is_padding(salted):
  source = data.open_source('auto', salted, 'val', 8)
  options = {'batch_size': 4, 'image_size': 8}
  with pytest.raises(errors.DataError, match='val/a/03.png is no image'):
    list(data.make_eval_dataset(source, **options))
  batches = list(data.make_eval_dataset(source, skip_bad=True, **options))
  masks = np.concatenate([batch['mask'] for batch in batches])
  assert masks.tolist() == [i not in (3, 9, 10, 11) for i in range(12)]


def test_a_source_of_bad_pictures_alone_ends(tmp_path):
  for i in range(3):
    (tmp_path / f'{i}.png').write_bytes(b'<html>')
  source = data.open_source('auto', str(tmp_path), 'train', 8)
  with pytest.raises(errors.DataError, match='images in a row cannot be read'):
    takes.take(source, 1, skip_bad=True)
