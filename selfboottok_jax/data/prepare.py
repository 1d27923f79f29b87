"""Checks photographs in any form, and makes a prepared data set of them.

See `records` for what is written. A shard holds a fixed range of the pictures,
so what is written depends neither on the number of processes nor on how often
they were stopped.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import process
from typing import Any

import numpy as np
from array_record.python import array_record_module
from PIL import Image

from selfboottok_jax import errors, files
from selfboottok_jax.data import (
  picture_set,
  pictures,
  records,
  synsets,
  transforms,
)

# Pictures of a shard, unless there would be too many shards.
SHARD_IMAGES = 1_000
MOST_SHARDS = 1_024
# Pictures that a process checks at a time.
_CHUNK = 250
# A record to a chunk, for random access; pictures do not compress further.
_OPTIONS = 'group_size:1,uncompressed'
_PROGRESS = '.progress'
_PLAN = 'plan.json'
# Seconds between two lines of progress.
_EVERY = 10.0

Bad = picture_set.Bad
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Changes that are made to each picture.

  Attributes:
    resize: pictures whose shorter side is longer are resized to it, turned
      upright and stored as JPEG; 0 stores every file as it is.
    quality: of such JPEGs, without subsampled colours.
    options: how pictures are decoded.
  """

  resize: int = 0
  quality: int = 95
  options: pictures.Options = dataclasses.field(
    default_factory=pictures.Options
  )

  def check(self) -> None:
    """Raises ConfigError for values that no picture can have."""
    for name, value, low, high in (
      ('--resize', self.resize, 0, 2**15),
      ('--quality', self.quality, 1, 100),
    ):
      if not low <= value <= high:
        raise errors.ConfigError(f'{name}={value}; wanted {low} to {high}')


@dataclasses.dataclass(frozen=True)
class _Task:
  """Some of a split's pictures; `file` is the shard they make, or ''."""

  split: str
  first: int
  end: int
  file: str = ''


@dataclasses.dataclass(frozen=True)
class _Done:
  """The outcome of a task.

  Attributes:
    bad: reasons by the index of the picture that cannot be read.
    rows: label, bytes and name of each record.
    shard: the file that was written.
  """

  bad: Mapping[int, str]
  rows: Sequence[tuple[int, int, str]] = ()
  shard: records.Shard | None = None


class BadPicturesError(errors.DataError):
  """Pictures that cannot be read, where they are not to be left out.

  Attributes:
    report: lists them all, see `make_report`.
  """

  def __init__(self, message: str, report: dict[str, Any]):
    """Takes the message and the report."""
    super().__init__(message)
    self.report = report


def check(
  found: picture_set.PictureSet,
  *,
  options: pictures.Options | None = None,
  num_workers: int = 1,
  say: Say = lambda text: None,
) -> dict[str, Any]:
  """Decodes every picture of a data set; writes nothing.

  The shards of a prepared one are compared with their hashes too.

  Args:
    found: the data set.
    options: how pictures are decoded.
    num_workers: processes; 1 works in this one.
    say: called with lines of progress.

  Returns:
    The report, see `make_report`.
  """
  tasks = [
    _Task(split, first, min(first + _CHUNK, len(part)))
    for split, part in found.splits.items()
    for first in range(0, len(part), _CHUNK)
  ]
  settings = Settings(options=options or pictures.Options())
  bad: dict[str, dict[int, str]] = {split: {} for split in found.splits}
  for task, done in _run(found, settings, '', tasks, num_workers, say):
    bad[task.split] |= done.bad
  if records.is_prepared(found.path):
    damaged = tuple(records.find_damaged(found.path))
    found = dataclasses.replace(found, bad=found.bad + damaged)
  return make_report(found, bad)


def make_report(
  found: picture_set.PictureSet, bad: Mapping[str, Mapping[int, str]]
) -> dict[str, Any]:
  """Returns what a data set holds and what is wrong with it, for JSON.

  Args:
    found: the data set.
    bad: by split, the reasons why pictures cannot be read, by index.
  """
  splits = {}
  every = list(found.bad)
  for split, part in found.splits.items():
    counts = found.count_classes(split)
    for index, reason in sorted(bad[split].items()):
      every.append(Bad(part.path(index), reason))
      if counts:
        counts[found.class_names[part.labels[index]]] -= 1
    images = len(part) - len(bad[split])
    splits[split] = {'images': images, 'classes': counts}
  return {
    'splits': splits,
    'bad': [dataclasses.asdict(item) for item in every],
    'skipped': dict(found.skipped),
    'notes': [found.origin, *found.notes],
    'fingerprint': found.fingerprint,
  }


def prepare(
  found: picture_set.PictureSet,
  out: str,
  settings: Settings,
  *,
  skip_bad: bool = False,
  most_bad: float | int = 0.01,
  num_workers: int = 1,
  say: Say = lambda text: None,
) -> dict[str, Any]:
  """Writes a prepared data set; a stopped call continues when it is repeated.

  Args:
    found: the pictures.
    out: folder of the new data set.
    settings: what is done with each picture.
    skip_bad: whether to leave out pictures that cannot be read; otherwise they
      are an error, once all have been tried.
    most_bad: share of pictures that may be left out.
    num_workers: processes; 1 works in this one. They do not change the files.
    say: called with lines of progress.

  Returns:
    The report, see `make_report`.

  Raises:
    DataError: pictures that cannot be read, a folder with something else in it,
      a full disk.
  """
  settings.check()
  tasks = _plan(found)
  plan = _describe_plan(found, settings, tasks)
  folder = pathlib.Path(out)
  if (folder / records.INDEX).exists():
    index = records.read_index(out)
    if index['plan'] != plan:
      raise errors.DataError(
        f'--out={out} holds a data set of other images or settings; choose '
        'another folder'
      )
    say(f'{out} is complete')
    return index['report']
  _claim(found, folder, plan, settings)
  total = sum(len(part) for part in found.splits.values()) + len(found.bad)
  pending = {task: _read_done(folder, task) for task in tasks}
  outcomes = {task: done for task, done in pending.items() if done}
  if outcomes:
    say(f'{len(outcomes):,} of {len(tasks):,} shards are there already')
  missing = [task for task in tasks if task not in outcomes]
  for task, done in _run(found, settings, out, missing, num_workers, say):
    outcomes[task] = done
    count = sum(len(each.bad) for each in outcomes.values()) + len(found.bad)
    if count > most_bad * total:
      path, reason = _first_bad(found, outcomes)
      raise errors.DataError(
        f'{count:,} of {total:,} images cannot be read, more than --most_bad='
        f'{most_bad}, such as {path}: {reason}; --check --report=FILE lists '
        'them all'
      )
  bad: dict[str, dict[int, str]] = {split: {} for split in found.splits}
  for task, done in outcomes.items():
    bad[task.split] |= done.bad
  count = sum(map(len, bad.values())) + len(found.bad)
  if count and not skip_bad:
    path, reason = _first_bad(found, outcomes)
    raise BadPicturesError(
      f'{count:,} of {total:,} images cannot be read, such as {path}: {reason};'
      ' --skip_bad leaves them out, --report=FILE lists them',
      make_report(found, bad),
    )
  return _finish(
    found, folder, plan, settings, outcomes, make_report(found, bad)
  )


def _plan(found: picture_set.PictureSet) -> list[_Task]:
  """The shards of each split, by the number of its pictures alone."""
  tasks = []
  for split, part in found.splits.items():
    wanted = math.ceil(len(part) / SHARD_IMAGES)
    shards = min(wanted, MOST_SHARDS)
    for shard in range(shards):
      file = f'{split}-{shard:05d}-of-{shards:05d}.array_record'
      first, end = (i * len(part) // shards for i in (shard, shard + 1))
      tasks.append(_Task(split, first, end, file))
  return tasks


def _describe_plan(
  found: picture_set.PictureSet, settings: Settings, tasks: Sequence[_Task]
) -> str:
  """A hash of everything that determines what is written."""
  content = {
    'version': records.VERSION,
    'settings': dataclasses.asdict(settings),
    'fingerprints': [part.fingerprint for part in found.splits.values()],
    'classes': found.class_names,
    'shards': [task.file for task in tasks],
  }
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _claim(
  found: picture_set.PictureSet,
  folder: pathlib.Path,
  plan: str,
  settings: Settings,
) -> None:
  """Makes the folder, or checks that it holds this very preparation."""
  progress = folder / _PROGRESS
  with contextlib.suppress(OSError, ValueError, KeyError):
    if json.loads((progress / _PLAN).read_text())['plan'] == plan:
      return
  # A call that was stopped before its first shard leaves hidden files alone.
  if not files.is_vacant(folder):
    raise errors.DataError(
      f'--out={folder} is not empty, and holds no preparation of these images '
      'with these settings; choose another folder'
    )
  if not settings.resize:
    sizes = sum(int(part.sizes.sum()) for part in found.splits.values())
    path = folder.absolute()
    nearest = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(nearest).free
    # Headers, and names.
    needed = round(sizes * 1.01) + 2**20
    if needed > free:
      raise errors.DataError(
        f'--out={folder} would take {needed / 1e9:,.2f} GB, and there are '
        f'{free / 1e9:,.2f} GB free; make room, choose another disk, or set '
        '--resize'
      )
  with _writing(folder):
    shutil.rmtree(progress, ignore_errors=True)
    files.write_json(progress / _PLAN, {'plan': plan})


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
  """Turns errors of the file system into a DataError of one line."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise errors.DataError(
      f'--out={folder} cannot be written: {error}; make room or choose another '
      'folder, the same command continues'
    ) from error


def _first_bad(
  found: picture_set.PictureSet, outcomes: Mapping[_Task, _Done]
) -> tuple[str, str]:
  """Name and reason of the first picture that cannot be read."""
  for task in sorted(outcomes, key=lambda task: (task.split, task.first)):
    for index, reason in sorted(outcomes[task].bad.items()):
      return found.splits[task.split].path(index), reason
  return found.bad[0].path, found.bad[0].reason


def _sidecar(folder: pathlib.Path, task: _Task) -> pathlib.Path:
  return folder / _PROGRESS / f'{task.file}.json'


def _read_done(folder: pathlib.Path, task: _Task) -> _Done | None:
  """The outcome of a task that an earlier call finished, or None."""
  try:
    text = _sidecar(folder, task).read_text('utf-8', 'surrogateescape')
    content = json.loads(text)
    done = _Done(
      {int(index): reason for index, reason in content['bad'].items()},
      [tuple(row) for row in content['rows']],
      records.Shard(**content['shard']),
    )
    file = folder / task.file
    whole = done.shard and file.stat().st_size == done.shard.bytes
    return done if whole else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _finish(
  found: picture_set.PictureSet,
  folder: pathlib.Path,
  plan: str,
  settings: Settings,
  outcomes: Mapping[_Task, _Done],
  report: dict[str, Any],
) -> dict[str, Any]:
  """Writes the rows of each split and, last, the index.

  Returns:
    The report, with the fingerprint of what was written.
  """
  splits: dict[str, Any] = {}
  whole: dict[str, picture_set.Split] = {}
  for split, part in found.splits.items():
    tasks = sorted(
      (task for task in outcomes if task.split == split),
      key=lambda task: task.first,
    )
    rows = [row for task in tasks for row in outcomes[task].rows]
    shards = [s for task in tasks if (s := outcomes[task].shard)]
    data = records.write_rows(rows)
    names = [name for _, _, name in rows]
    sizes = np.array([size for _, size, _ in rows], np.int64)
    labels = np.array([label for label, _, _ in rows], np.int32)
    digest = picture_set.digest(found.class_names, names, sizes, labels)
    whole[split] = picture_set.Split(
      names, sizes, labels, records.RecordReader(str(folder), shards), digest
    )
    splits[split] = {
      'images': len(rows),
      'fingerprint': whole[split].fingerprint,
      'digest': digest,
      # Only of the very same pictures.
      'former': part.former if digest == part.digest else '',
      'prefix': part.prefix,
      'rows_sha256': hashlib.sha256(data).hexdigest(),
      'shards': [dataclasses.asdict(shard) for shard in shards],
    }
    with _writing(folder):
      files.write_atomically(folder / f'{split}.tsv', data, durable=True)
  made = dataclasses.replace(found, splits=whole)
  report = report | {'fingerprint': made.fingerprint}
  notes = list(found.notes)
  if report['bad']:
    notes.append(
      f'{len(report["bad"]):,} unreadable images were left out when it was '
      'prepared'
    )
  index = {
    'kind': records.KIND,
    'version': records.VERSION,
    'class_names': found.class_names,
    'readable_names': synsets.readable(found.class_names),
    'origin': found.origin,
    'notes': notes,
    'skipped': dict(found.skipped),
    'resize': settings.resize,
    'splits': splits,
    'plan': plan,
    'report': report,
  }
  text = json.dumps(index, indent=2, ensure_ascii=False) + '\n'
  with _writing(folder):
    files.write_atomically(
      folder / records.INDEX, text.encode(*picture_set.UTF8), durable=True
    )
    shutil.rmtree(folder / _PROGRESS, ignore_errors=True)
  return report


def _run(
  found: picture_set.PictureSet,
  settings: Settings,
  out: str,
  tasks: Sequence[_Task],
  num_workers: int,
  say: Say,
) -> Iterator[tuple[_Task, _Done]]:
  """Does tasks in some processes; yields them in the order they are done."""
  total = sum(task.end - task.first for task in tasks)
  count, began = 0, time.monotonic()
  shown = began
  with _pool(found, settings, out, num_workers) as submit:
    for task, done in submit(tasks):
      count += task.end - task.first
      if time.monotonic() - shown > _EVERY:
        shown = time.monotonic()
        rate = count / (shown - began)
        say(f'{count:,} of {total:,} images, {rate:,.0f} a second')
      yield task, done


Submit = Callable[[Sequence[_Task]], Iterator[tuple[_Task, _Done]]]


@contextlib.contextmanager
def _pool(
  found: picture_set.PictureSet,
  settings: Settings,
  out: str,
  num_workers: int,
) -> Iterator[Submit]:
  """Starts the processes; they end with the context, also by an exception."""
  if num_workers <= 1:
    worker = _Worker(found, settings, out)
    yield lambda tasks: ((task, worker.do(task)) for task in tasks)
    return
  # Not by fork, which copies whatever threads of other libraries hold.
  context = multiprocessing.get_context('spawn')
  executor = concurrent.futures.ProcessPoolExecutor(
    num_workers, context, _start_worker, (found, settings, out)
  )

  def submit(tasks: Sequence[_Task]) -> Iterator[tuple[_Task, _Done]]:
    # Processes start here. An interrupt would end them before they have read
    # what to do, with a traceback of their own.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
      waiting = {executor.submit(_do, task): task for task in tasks}
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for future in concurrent.futures.as_completed(waiting):
      yield waiting[future], future.result()

  children = set(multiprocessing.active_children())
  try:
    yield submit
    executor.shutdown()
  except process.BrokenProcessPool as error:
    raise errors.DataError(
      'a process that read images was killed, for lack of memory perhaps; the '
      'same command continues, with a lower --num_workers'
    ) from error
  finally:
    executor.shutdown(wait=False, cancel_futures=True)
    # They are in the middle of a shard, which would take seconds more.
    for child in set(multiprocessing.active_children()) - children:
      child.terminate()
      child.join()


_worker: '_Worker | None' = None


def _start_worker(
  found: picture_set.PictureSet, settings: Settings, out: str
) -> None:
  """Prepares a process for tasks."""
  global _worker
  # An interrupt of the terminal goes to all; the first process ends the others.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  _worker = _Worker(found, settings, out, parent=os.getppid())


def _do(task: _Task) -> _Done:
  assert _worker is not None
  return _worker.do(task)


class _Worker:
  """Decodes pictures, and writes shards if there is a folder for them."""

  def __init__(
    self,
    found: picture_set.PictureSet,
    settings: Settings,
    out: str,
    parent: int = 0,
  ):
    self._found, self._settings, self._out = found, settings, out
    self._parent = parent

  def do(self, task: _Task) -> _Done:
    """Checks the pictures of a task, or makes its shard."""
    if task.file:
      return self._write(task)
    return _Done(dict(self._bad(task)))

  def _bad(self, task: _Task) -> Iterator[tuple[int, str]]:
    for index in range(task.first, task.end):
      try:
        self._read(task, index)
      except errors.DataError as error:
        yield index, getattr(error, 'reason', str(error))

  def _read(self, task: _Task, index: int) -> tuple[bytes, pictures.Pixels]:
    """A picture's file and its pixels; DataError if it cannot be read."""
    if self._parent and os.getppid() != self._parent:
      # The first process was killed, and nobody would see the rest.
      os._exit(1)
    part = self._found.splits[task.split]
    data = part.read(index)
    return data, pictures.decode(data, part.path(index), self._settings.options)

  def _write(self, task: _Task) -> _Done:
    """Writes a shard under a hidden name, and renames it when it is whole."""
    folder = pathlib.Path(self._out)
    part = self._found.splits[task.split]
    partial = folder / f'.{task.file}.{os.getpid()}.partial'
    for old in folder.glob(f'.{task.file}.*.partial'):
      old.unlink(missing_ok=True)
    bad: dict[int, str] = {}
    rows: list[tuple[int, int, str]] = []
    with _writing(folder):
      writer = array_record_module.ArrayRecordWriter(str(partial), _OPTIONS)
      try:
        for index in range(task.first, task.end):
          try:
            data, pixels = self._read(task, index)
          except errors.DataError as error:
            bad[index] = getattr(error, 'reason', str(error))
            continue
          record = self._encode(data, pixels)
          writer.write(record)
          label = int(part.labels[index])
          rows.append((label, len(record), part.names[index]))
      finally:
        writer.close()
      shard = records.Shard(
        task.file, len(rows), partial.stat().st_size, records.sha256_of(partial)
      )
      with partial.open('rb') as file:
        os.fsync(file.fileno())
      os.replace(partial, folder / task.file)
      content = {
        'bad': bad,
        'rows': rows,
        'shard': dataclasses.asdict(shard),
      }
      files.write_atomically(
        _sidecar(folder, task),
        json.dumps(content, ensure_ascii=False).encode(*picture_set.UTF8),
      )
    return _Done(bad, rows, shard)

  def _encode(self, data: bytes, pixels: pictures.Pixels) -> bytes:
    """The record of a picture: its file, or a smaller JPEG."""
    resize, shape = self._settings.resize, (pixels.shape[0], pixels.shape[1])
    picture = Image.fromarray(pixels)
    if resize and min(shape) > resize:
      rows, columns = transforms.cover(shape, resize)
      picture = picture.resize((columns, rows), Image.Resampling.LANCZOS)
    # Those that are not resized are stored upright too, so that all are alike.
    elif not (
      resize and self._settings.options.exif and pictures.is_turned(data)
    ):
      return data
    buffer = io.BytesIO()
    picture.save(buffer, 'JPEG', quality=self._settings.quality, subsampling=0)
    return buffer.getvalue()
