"""A folder of samples that is filled batch by batch and survives a stop.

  sampling.json       the settings of the samples; others are refused
  images/             000000_class0007.png, one file per sample
  samples.npz         arr_0 (uint8 [n, h, w, 3]) and arr_1 (labels), as ADM's
                      evaluator reads them
  grids/              a picture for each class
  grid.png            the first classes together; the last file to be written
  parts/              batches of samples.npz, until all of them are there

A sample is known by its index, so a folder may be continued with another batch
size and by another number of processes. It may be in an object store.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import io
import json
import os
import pathlib
import re
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils
from jaxtyping import Int, UInt8
from PIL import Image

from selfboottok_jax import errors, files, inference, trees
from selfboottok_jax.data import cores, synsets
from selfboottok_jax.evaluation import evaluate, npz_files, pictures
from selfboottok_jax.flow import samplers
from selfboottok_jax.inference import device_batch
from selfboottok_jax.training import processes

SETTINGS = 'sampling.json'
ARRAYS = 'samples.npz'
GRID = 'grid.png'
_IMAGE = re.compile(r'(\d+)_class\d+\.png')
_PART = re.compile(r'\d.*\.npz')
# Errors of reading a damaged part.
_DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)
_PER_CLASS = 16  # Samples in the picture of a class.
_COLUMNS = 4
# Threads that compress images: a core writes about a hundred a second.
_LEAST_WRITERS, _MOST_WRITERS = 4, 16


class SampleFolder:
  """A set of samples on disk, each of them known by its index."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    labels: Int[np.ndarray, ' n'],
    *,
    png: bool = True,
    npz: bool = False,
  ):
    """Opens a folder for samples of `labels`; nothing is written yet.

    Args:
      path: the folder; it need not exist.
      settings: everything that the samples depend on, as JSON values.
      labels: classes of all samples, by index.
      png: whether to write an image file of each sample.
      npz: whether to end with all samples in one file.

    Raises:
      UserError: the folder holds something else, or nothing is to be kept.
    """
    if not (png or npz):
      raise errors.UserError(
        '--nopng without --npz keeps no sample; wanted one of them'
      )
    self.path, self.labels = files.as_path(path), labels
    self._png, self._npz = png, npz
    # Through JSON and back: tuples become lists, as in the record on disk that
    # these are compared with.
    self._settings = json.loads(
      json.dumps(
        {**settings, 'num_samples': len(labels), 'png': png, 'npz': npz}
      )
    )
    self._check()

  @property
  def identity(self) -> str:
    """Returns settings and labels as text: equal only if the samples are."""
    return json.dumps([self._settings, self.labels.tolist()], sort_keys=True)

  @property
  def is_complete(self) -> bool:
    """Returns True if `finish` has nothing left to do."""
    with self._writing():
      is_drawn = (self.path / GRID).is_file() and (self.path / 'grids').is_dir()
      is_tidy = not (self.path / 'parts').exists()
      return is_drawn and is_tidy and not self.missing().size

  def begin(self) -> None:
    """Makes the folder and records the settings in it."""
    with self._writing():
      files.write_json(self.path / SETTINGS, self._settings)

  def missing(self) -> Int[np.ndarray, ' m']:
    """Returns ascending indices of the samples that are not written yet."""
    here = np.zeros(len(self.labels), bool)
    with files.reaching(self.path):
      if not self._npz:
        here[self._indices_of_images()] = True
      elif (self.path / ARRAYS).exists():
        here[:] = True
      else:
        for indices, _ in self._read_parts():
          here[indices] = True
    return np.flatnonzero(~here)

  def add(
    self,
    indices: Int[np.ndarray, ' b'],
    images: UInt8[np.ndarray, 'b h w 3'],
  ) -> None:
    """Writes a batch of samples; each file is written whole or not at all."""
    with self._writing():
      if self._png:
        writers = min(max(cores.count_cores(), _LEAST_WRITERS), _MOST_WRITERS)
        with concurrent.futures.ThreadPoolExecutor(writers) as pool:
          list(pool.map(self._save_image, indices.tolist(), images))
      if self._npz:
        # The name says which samples a part holds, so no two processes write
        # the same file.
        buffer = io.BytesIO()
        np.savez(buffer, indices=indices, images=images)
        name = f'{indices[0]:08d}-{indices[-1]:08d}-{len(indices)}.npz'
        files.write_atomically(
          self.path / 'parts' / name, buffer.getvalue(), durable=True
        )

  def finish(self, class_names: Sequence[str]) -> None:
    """Draws the grids and, with `npz`, writes samples.npz.

    Raises:
      UserError: samples are missing.
    """
    missing = self.missing()
    if missing.size:
      raise errors.UserError(
        f'{self.path} lacks {missing.size} of {len(self.labels)} samples, the '
        f'first of them {missing[0]}; give the same command again, with one '
        'folder that all processes see'
      )
    with self._writing():
      # Every sample is here, so no process is writing one.
      for folder in (self.path, self.path / 'images'):
        files.remove_partials(folder)
      self._draw_grids(class_names)
      if self._npz and not (self.path / ARRAYS).exists():
        self._write_arrays()
      # Last: a stop before this line needs the parts again.
      files.remove_tree(self.path / 'parts')

  def _check(self) -> None:
    """Raises UserError if the folder holds other samples or other files."""
    record = self.path / SETTINGS
    with files.reaching(record):
      text = record.read_bytes() if record.exists() else None
    if text is None:
      if not files.is_vacant(self.path):
        raise errors.UserError(
          f'--out={self.path} is not empty and holds no samples; choose a new '
          'folder, nothing is overwritten'
        )
      return
    try:
      there = dict(json.loads(text))
    except (ValueError, TypeError) as error:
      raise errors.UserError(
        f'{record} is damaged ({error}); choose another folder'
      ) from error
    if differing := trees.differences(there, self._settings):
      raise errors.UserError(
        f'--out={self.path} holds other samples ({differing}); '
        'choose another folder, or the same values'
      )

  def _image_path(self, index: int) -> files.Path:
    name = f'{index:06d}_class{self.labels[index]:04d}.png'
    return self.path / 'images' / name

  def _save_image(self, index: int, image: UInt8[np.ndarray, 'h w 3']) -> None:
    # Compressed fast: there are fifty thousand of them.
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG', compress_level=1)
    files.write_atomically(self._image_path(index), buffer.getvalue())

  def _indices_of_images(self) -> list[int]:
    folder = self.path / 'images'
    if not isinstance(folder, pathlib.Path):
      names = [child.name for child in files.children(folder)]
    elif folder.is_dir():
      # A loss of power may leave empty files.
      names = [e.name for e in os.scandir(folder) if e.stat().st_size]
    else:
      names = []
    found = [match for name in names if (match := _IMAGE.fullmatch(name))]
    return [int(m[1]) for m in found if int(m[1]) < len(self.labels)]

  def _read_parts(self) -> Iterator[tuple[Int[np.ndarray, ' b'], files.Path]]:
    """Yields indices and path of each part."""
    for path in sorted(files.children(self.path / 'parts')):
      if not _PART.fullmatch(path.name):
        continue
      try:
        with _load(path) as arrays:
          indices = arrays['indices']
      except _DAMAGED:
        continue  # Its samples are made again.
      yield indices, path

  def _in_order(
    self, wanted: Int[np.ndarray, ' m']
  ) -> Iterator[UInt8[np.ndarray, 'h w 3']]:
    """Yields samples by ascending index, with one part in memory at a time."""
    if not self._npz:
      for index in wanted:
        path = self._image_path(int(index))
        with path.open('rb') as file, Image.open(file) as image:
          yield np.asarray(image)
      return
    if (self.path / ARRAYS).exists():
      with _load(self.path / ARRAYS) as arrays:
        yield from arrays['arr_0'][wanted]
      return
    # A later part overrides an earlier one with the same index: both hold the
    # same pixels.
    place = {
      int(index): (path, row)
      for indices, path in self._read_parts()
      for row, index in enumerate(indices)
    }
    opened, images = None, np.empty(0)
    for index in wanted:
      path, row = place[int(index)]
      if path != opened:
        with _load(path) as arrays:
          opened, images = path, arrays['images']
      yield images[row]

  def _draw_grids(self, class_names: Sequence[str]) -> None:
    """Draws a grid for each class, and one of the first classes together."""
    chosen = {
      label: np.flatnonzero(self.labels == label)[:_PER_CLASS]
      for label in np.unique(self.labels).tolist()
    }
    wanted = np.unique(np.concatenate(list(chosen.values())))
    images = dict(zip(wanted.tolist(), self._in_order(wanted), strict=True))
    rows = []
    for label, indices in chosen.items():
      of_class = np.stack([images[index] for index in indices.tolist()])
      shown = pictures.enlarge(of_class)
      name = _file_name(class_names[label])
      pictures.save_png(
        self.path / 'grids' / f'class{label:04d}_{name}.png',
        pictures.grid(shown, min(len(shown), _COLUMNS)),
      )
      rows.append(shown)
    columns = min(8, min(len(row) for row in rows))
    first = np.concatenate([row[:columns] for row in rows[:10]])
    # Last, as it marks the end.
    pictures.save_png(self.path / GRID, pictures.grid(first, columns))

  def _write_arrays(self) -> None:
    """Streams all samples into one file that numpy reads."""
    count = len(self.labels)
    samples = self._in_order(np.arange(count))
    first = next(samples)
    labels = {'arr_1': self.labels.astype(np.int64)}
    shape = (count, *first.shape)
    with npz_files.writing(self.path / ARRAYS, shape, labels) as file:
      file.write(first.tobytes())
      for image in samples:
        file.write(image.tobytes())

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Turns a failure to read or write into a UserError about the folder."""
    try:
      with files.reaching(self.path):
        yield
    except OSError as error:
      raise errors.UserError(
        f'{self.path} cannot be written or read ({error}); make room and give '
        'the same command again'
      ) from error


@contextlib.contextmanager
def _load(path: files.Path) -> Iterator[Any]:
  """Opens a file of arrays, which may be in an object store."""
  with path.open('rb') as file, np.load(file) as arrays:
    yield arrays


def _file_name(name: str) -> str:
  """Turns a class name into characters that every file system allows."""
  return re.sub(r'[^\w.-]+', '_', name)[:60]


def sample_folders(
  generator: inference.ImageGenerator,
  sweep: Sequence[inference.Sampling],
  out: str | os.PathLike[str],
  labels: Int[np.ndarray, ' n'],
  *,
  labels_as: str,
  batch_size: int = 0,
  seed: int = 0,
  rounding: str = 'truncate',
  png: bool = True,
  npz: bool = False,
  by_memory: bool = False,
) -> Iterator[str]:
  """Fills a folder of samples for each setting of a sweep.

  Folders that a stop left unfinished are continued. The processes of a run
  share the samples.

  Args:
    generator: makes the samples.
    sweep: settings; several of them have a folder each, below `out`.
    out: the folder.
    labels: classes of all samples, by index.
    labels_as: the labels in words, for the record.
    batch_size: samples between two writes of a process; 0 is as many as its
      devices compute at a time.
    seed: seed of the noise.
    rounding: a key of `pixels.ROUNDINGS`.
    png: whether to write an image file of each sample.
    npz: whether to end with all samples in one file.
    by_memory: let the memory of the devices decide how many samples each
      computes at a time, and not the generator. A folder that was begun goes on
      with the number on its record, as results depend on it by their rounding.

  Yields:
    A sentence for each folder when it is complete.

  Raises:
    UserError: a folder holds something else, or the processes disagree.
  """
  known = {
    'generator': trees.weights_hash(generator.params),
    'tokenizer': trees.weights_hash(generator.tokenizer.params),
    'step': generator.step,
    'seed': seed,
    'rounding': rounding,
    'labels': labels_as,
  }
  out = files.as_path(out)
  paths = [out / s.name if len(sweep) > 1 else out for s in sweep]
  at_a_time = [generator.device_batch] * len(sweep)
  if by_memory:
    # A device that lacks memory fails for all processes, and so does the one
    # with the least memory decide for all.
    with processes.all_or_none():
      at_a_time = _device_batches(
        generator, sweep, paths, len(labels), batch_size
      )
    at_a_time = _least_of_all(at_a_time)
  # No process creates a folder while another still checks it.
  with processes.all_or_none():
    folders = [
      SampleFolder(
        path,
        {**known, 'device_batch': size, **dataclasses.asdict(sampling)},
        labels,
        png=png,
        npz=npz,
      )
      for path, size, sampling in zip(paths, at_a_time, sweep, strict=True)
    ]
  processes.check_same(
    'samples to make', '\n'.join(folder.identity for folder in folders)
  )
  for size, sampling, folder in zip(at_a_time, sweep, folders, strict=True):
    own = generator.with_device_batch(size)
    yield fill_folder(
      own,
      sampling,
      folder,
      batch_size=batch_size or own.round_size,
      seed=seed,
      rounding=rounding,
    )


def _device_batches(
  generator: inference.ImageGenerator,
  sweep: Sequence[inference.Sampling],
  paths: Sequence[files.Path],
  count: int,
  batch_size: int,
) -> list[int]:
  """The number of samples of a device at a time, for each folder of a sweep.

  It is that on the folder's record, if there is one. Else it is what the
  devices' memory allows, the same for all settings, and no more than `count`
  samples need, or the `batch_size` samples of this process between two writes,
  if that is not 0.
  """
  recorded = [_recorded_device_batch(path) for path in paths]
  chosen = 0
  if None in recorded:
    chosen = _fit_device_batch(generator, sweep, count, batch_size)
  return [size or chosen for size in recorded]


def _fit_device_batch(
  generator: inference.ImageGenerator,
  sweep: Sequence[inference.Sampling],
  count: int,
  batch_size: int,
) -> int:
  # Rounded up to a power of two.
  of_process = -(-count // jax.process_count())
  if batch_size:
    of_process = min(of_process, batch_size)
  share = max(1, -(-of_process // generator.mesh.size))
  most = min(1 << (share - 1).bit_length(), device_batch.MOST)
  # Guided steps take twice the memory of others.
  hungriest = max(sweep, key=lambda sampling: sampling.guides)
  return generator.fit_device_batch(hungriest, most=most)


def _least_of_all(numbers: Sequence[int]) -> list[int]:
  """The least of each number over all processes."""
  if jax.process_count() == 1:
    return [*numbers]
  every = multihost_utils.process_allgather(np.asarray(numbers))
  return [int(least) for least in every.min(axis=0)]


def fit_device_batch(
  generator: inference.ImageGenerator,
  sweep: Sequence[inference.Sampling],
  count: int,
  batch_size: int,
) -> int:
  """Chooses how many samples each device computes at a time.

  It is what the memory of every one allows, and no more than `count` samples
  need, or the `batch_size` samples of a process between two writes, if that is
  not 0. All processes must call this together, and get the same.
  """
  with processes.all_or_none():
    chosen = _fit_device_batch(generator, sweep, count, batch_size)
  return _least_of_all([chosen])[0]


def _recorded_device_batch(path: files.Path) -> int | None:
  """The number on a folder's record; None if there is no such record."""
  try:
    with files.reaching(path):
      size = json.loads((path / SETTINGS).read_bytes())['device_batch']
  except (OSError, ValueError, TypeError, KeyError):
    # What is damaged is told when the folder is opened.
    return None
  return size if isinstance(size, int) and size > 0 else None


def fill_folder(
  generator: inference.ImageGenerator,
  sampling: inference.Sampling,
  folder: SampleFolder,
  *,
  batch_size: int,
  seed: int,
  rounding: str,
) -> str:
  """Makes the missing samples of a folder, each process its share of them.

  Returns:
    A sentence about what was made.
  """
  is_first, count = jax.process_index() == 0, len(folder.labels)
  missing = _agree_on_missing(folder)
  if missing is None:
    return f'{count} samples are in {folder.path} already'
  mine = missing[jax.process_index() :: jax.process_count()]
  began = time.monotonic()
  bar = tqdm.tqdm(
    total=len(mine),
    desc=sampling.describe(),
    unit='image',
    # tqdm reads None as "show the bar on a terminal only".
    disable=None if is_first else True,
  )

  def keep(indices: Int[np.ndarray, ' b'], images: Any) -> None:
    folder.add(indices, np.asarray(images))
    bar.update(len(indices))

  pending = None
  with processes.all_or_none(), bar:
    for first in range(0, len(mine), batch_size):
      indices = mine[first : first + batch_size]
      images = generator.sample_uint8(
        folder.labels[indices],
        seed=seed,
        indices=indices,
        rounding=rounding,
        **dataclasses.asdict(sampling),
      )
      # The devices compute this batch while the one before is written.
      if pending:
        keep(*pending)
      pending = indices, images
    if pending:
      keep(*pending)
  rate = len(mine) * jax.process_count() / (time.monotonic() - began)
  # No process begins with the next folder before this one is complete.
  with processes.all_or_none():
    if is_first:
      folder.finish(generator.class_names)
  new = f', {len(missing)} of them now' if len(missing) < count else ''
  return (
    f'{count} samples in {folder.path}{new} ({rate:.3g} images/s, '
    f'{generator.device_batch} at a time on each device; '
    f'{sampling.describe()})'
  )


def _agree_on_missing(folder: SampleFolder) -> Int[np.ndarray, ' m'] | None:
  """Finds the missing samples; returns None if the folder is complete.

  The folder exists afterwards. Only the first process looks, and the others
  take its answer: they might see files that faster processes wrote meanwhile.
  """
  # "Complete" and the missing samples travel in one array of fixed length:
  # a broadcast between processes needs the same shape on each.
  state = np.zeros(1 + len(folder.labels), bool)
  with processes.all_or_none():
    if jax.process_index() == 0:
      folder.begin()
      state[0] = folder.is_complete
      state[1 + folder.missing()] = True
  if jax.process_count() > 1:
    state = multihost_utils.broadcast_one_to_all(state)
  return None if state[0] else np.flatnonzero(state[1:])


def make_labels(
  given: Sequence[str], count: int, seed: int, class_names: Sequence[str]
) -> Int[np.ndarray, ' n']:
  """Makes the int32 labels [count] of a set of samples.

  Args:
    given: ['balanced'] for equally many of each class, ['random'], or classes
      to repeat, each by its label or its name; that of an ImageNet synset may
      be any of its words. A random label depends on the seed and its index
      alone, so a longer set begins with the shorter one.
    count: number of samples.
    seed: seed of random labels.
    class_names: names of the labels from 0.

  Raises:
    ConfigError: something else was given.
  """
  num_classes = len(class_names)
  if list(given) == ['balanced']:
    return evaluate.balanced_labels(count, num_classes)
  if list(given) == ['random']:
    indices = jnp.asarray(np.arange(count))
    return np.asarray(samplers.sample_labels(seed, indices, num_classes))
  found = [_find_label(label, class_names) for label in given]
  return np.resize(np.array(found, np.int32), count)


def _find_label(given: str, class_names: Sequence[str]) -> int:
  """The label that a number or a name means; ConfigError for none or several.

  A number is a label, also where classes are named by numbers.
  """
  last = len(class_names) - 1
  if given.isdecimal() and int(given) <= last:
    return int(given)
  found = synsets.find(given, class_names)
  if len(found) == 1:
    return found[0]
  if found:
    several = ' or '.join(f'{i} ({class_names[i]})' for i in found)
    raise errors.ConfigError(
      f'--labels: {given!r} names {len(found)} classes; wanted one of {several}'
    )
  shown = synsets.readable(class_names)
  known = [*class_names, *shown]
  close = difflib.get_close_matches(given, known, n=3) or shown[:3]
  what = f'--labels: {given!r}' if given else '--labels='
  raise errors.ConfigError(
    f'{what} is no class; wanted balanced, random, integers from 0 to {last}, '
    f'or names, such as {", ".join(close)}'
  )
