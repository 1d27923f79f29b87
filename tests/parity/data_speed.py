"""Times decoding and cropping beside a bare Pillow loop and torch's DataLoader.

  python -m tests.parity.data_speed PHOTOS [IMAGE_SIZE] [ROUNDS] [BATCHES]

All read the same files of a folder in the same order and make batches of 32
uint8 crops as a training does: decode to RGB, resize the shorter side to a
random length by ADM's rule, cut a random square, mirror every other one. The
bare loop is Pillow's calls and nothing else: no checks of the files, no EXIF,
no shuffling, no seeds for each picture; its pixels are numpy arrays, stacked.
It works in this process, in two threads of it (a batch to each), or in two
processes that hand nothing over at all; ours in the same, but its batches
arrive here. They take turns, so that ratios hold on a busy machine.
"""

import concurrent.futures
import contextlib
import io
import itertools
import multiprocessing
import pathlib
import statistics
import sys
import time

import numpy as np
import torch
from PIL import Image

from launch import cli
from selfboottok_jax import data
from selfboottok_jax.evaluation import tables

BATCH = 32
PARALLEL = 2
MAX_SCALE = 1.25


def crop(file, size, rng):
  """The work itself: a file to a crop [size, size, 3]."""
  with open(file, 'rb') as opened:
    content = opened.read()
  with Image.open(io.BytesIO(content)) as opened:
    picture = opened.convert('RGB')
  shorter = int(rng.integers(size, int(MAX_SCALE * size) + 1))
  if min(picture.size) != shorter:
    while min(picture.size) >= 2 * shorter:
      half = (picture.width // 2, picture.height // 2)
      picture = picture.resize(half, Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    whole = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(whole, Image.Resampling.BICUBIC)
  left = int(rng.integers(picture.width - size + 1))
  top = int(rng.integers(picture.height - size + 1))
  picture = picture.crop((left, top, left + size, top + size))
  if rng.random() < 0.5:
    picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
  return np.asarray(picture)


def bare_batch(files, size):
  rng = np.random.default_rng()
  return np.stack([crop(file, size, rng) for file in files])


def _bare_batches(chunks, size):
  for files in chunks:
    bare_batch(files, size)


class Crops(torch.utils.data.Dataset):
  """The same work as torch's users write it."""

  def __init__(self, files, size):
    self.files, self.size = files, size
    self.rng = np.random.default_rng()

  def __len__(self):
    return len(self.files)

  def __getitem__(self, index):
    return torch.from_numpy(crop(self.files[index], self.size, self.rng).copy())


class Bench:
  """Every way to make `count` batches; each returns its seconds."""

  def __init__(self, path, size, count):
    self.path, self.size, self.count = str(path), size, count
    self.source = data.open_source('auto', self.path, 'train', size)
    found = sorted(
      file for file in pathlib.Path(path, 'train').rglob('*') if file.is_file()
    )
    assert len(found) == len(self.source)
    order = np.random.default_rng(0).permutation(len(found))
    names = itertools.cycle(str(found[i]) for i in order)
    self.chunks = [
      [next(names) for _ in range(BATCH)] for _ in range(self.count)
    ]
    self.files = [file for chunk in self.chunks for file in chunk]
    self.stack = contextlib.ExitStack()
    self.processes = self.stack.enter_context(
      concurrent.futures.ProcessPoolExecutor(
        PARALLEL, multiprocessing.get_context('spawn')
      )
    )
    self.threads = self.stack.enter_context(
      concurrent.futures.ThreadPoolExecutor(PARALLEL)
    )
    # Both have started before the clock does.
    list(self.processes.map(abs, range(8 * PARALLEL)))
    self.loader = torch.utils.data.DataLoader(
      Crops(self.files, size),
      BATCH,
      num_workers=PARALLEL,
      persistent_workers=True,
      multiprocessing_context='spawn',
    )

  def close(self):
    self.stack.close()

  def bare(self):
    _bare_batches(self.chunks, self.size)

  def bare_threads(self):
    work = [self.threads.submit(bare_batch, c, self.size) for c in self.chunks]
    for done in work:
      done.result()

  def bare_processes(self):
    work = [
      self.processes.submit(_bare_batches, self.chunks[i::PARALLEL], self.size)
      for i in range(PARALLEL)
    ]
    for done in work:
      done.result()

  def torch_workers(self):
    for _ in self.loader:
      pass

  @contextlib.contextmanager
  def ours(self, **options):
    """Yields what takes the batches of a pipeline that has started."""
    with contextlib.closing(
      data.make_train_dataset(
        self.source, batch_size=BATCH, image_size=self.size, seed=0, **options
      )
    ) as batches:
      # Those that were prepared before the clock starts do not count.
      for _ in range(batches.ahead):
        next(batches)

      def take():
        for _ in range(self.count):
          next(batches)

      yield take


def timed(work):
  began = time.monotonic()
  work()
  return time.monotonic() - began


def main(path, size=256, rounds=8, batches=24):
  """Prints images/s of each, and ratios of pairs that took turns."""
  bench = Bench(path, size, batches)
  ways = {
    'bare loop': (bench.bare, {'num_threads': 0}),
    f'bare loop, {PARALLEL} threads': (
      bench.bare_threads,
      {'num_threads': PARALLEL},
    ),
    f'bare loop, {PARALLEL} processes': (
      bench.bare_processes,
      {'num_threads': 0, 'num_workers': PARALLEL},
    ),
    f'torch DataLoader, {PARALLEL} workers': (
      bench.torch_workers,
      {'num_threads': 0, 'num_workers': PARALLEL},
    ),
  }
  rows = []
  images = BATCH * bench.count
  with contextlib.closing(bench):
    for name, (other, options) in ways.items():
      other()
      theirs, own = [], []
      for index in range(rounds):
        for which in (False, True)[:: -1 if index % 2 else 1]:
          if not which:
            theirs.append(timed(other))
            continue
          # Started here: it must not prepare batches beside the other.
          with bench.ours(**options) as take:
            own.append(timed(take))
      ratios = [a / b for a, b in zip(theirs, own, strict=True)]
      rows.append(
        {
          'beside': name,
          'its images/s': images / statistics.median(theirs),
          'ours images/s': images / statistics.median(own),
          'ours over it (median of pairs)': statistics.median(ratios),
          'least': min(ratios),
          'most': max(ratios),
        }
      )
  cli.say(
    f'{len(bench.source)} pictures of {path}, crops of {size}, batch {BATCH}, '
    f'{rounds} rounds of {bench.count} batches; torch {torch.__version__}'
  )
  cli.say(tables.table(rows, list(rows[0])))


if __name__ == '__main__':
  main(sys.argv[1], *(int(given) for given in sys.argv[2:]))
