"""Logging: metrics to JSONL and TensorBoard, progress to the terminal."""

import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import tqdm
from absl import logging

from selfboottok_jax import errors, files

METRICS = 'metrics.jsonl'
# Seconds between two uploads of logs that grow. Stores take one change of an
# object a second, and each sends the whole of it.
UPLOAD_EVERY = 30.0


# Begins the names of what evaluations measure.
EVALUATION = 'val/'


class MetricsWriter:
  """Writes metrics as JSON lines {"step": ..., name: value} and to TensorBoard.

  Lines of steps after `start_step` are removed first: a run that continues from
  an older checkpoint computes them again.

  Nothing can be appended to an object of an object store. For a workdir there
  the files grow in a temporary folder of this machine, and are uploaded whole
  twice a minute, by `flush` and by `close`.

  Attributes:
    evaluated: whether there is an evaluation of `start_step` in the log.
  """

  def __init__(self, workdir: str, *, start_step: int):
    """Opens the log files in `workdir`, an existing folder.

    Args:
      workdir: folder of a training.
      start_step: updates made so far; 0 for a new run.
    """
    folder = files.as_path(workdir)
    path = folder / METRICS
    kept = _lines_until(path, start_step) if files.exists(path) else []
    self.evaluated = any(
      name.startswith(EVALUATION)
      for line in kept
      if (record := json.loads(line))['step'] == start_step
      for name in record
    )
    # Atomically: an interruption cannot lose the log.
    text = ''.join(f'{line}\n' for line in kept)
    files.write_atomically(path, text.encode())
    self._upload: _Upload | None = None
    if not isinstance(folder, pathlib.Path):
      self._upload = _Upload(folder)
      folder = self._upload.folder
      (folder / METRICS).write_text(text)
    # Buffered by line, so a killed run loses no more than its last line.
    self._file = (folder / METRICS).open('a', buffering=1)
    self._board = _tensorboard(folder / 'tensorboard', start_step + 1)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of one step as one line.

    Values are Python floats: JSON cannot write arrays.
    """
    self._file.write(json.dumps({'step': step, **metrics}) + '\n')
    if self._board is None:
      return
    for name, value in metrics.items():
      self._board.add_scalar(name, value, step)

  def flush(self) -> None:
    """Puts all that was written into the workdir.

    Call it before a state is saved: a run that continues from that state has
    the lines before it then.
    """
    if self._upload is not None:
      self._upload.now()

  def close(self) -> None:
    """Flushes and closes both files."""
    self._file.close()
    if self._board is not None:
      self._board.close()
    if self._upload is not None:
      self._upload.close()


class _Upload:
  """A temporary folder whose files a thread uploads as they grow.

  Attributes:
    folder: the folder.
  """

  def __init__(self, target: files.Path):
    """Starts the thread; files get their names below `target`."""
    self._target = target
    self._temporary = tempfile.TemporaryDirectory(prefix='selfboottok_jax')
    self.folder = pathlib.Path(self._temporary.name)
    self._sent: dict[pathlib.Path, int] = {}
    self._lock, self._ended = threading.Lock(), threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def now(self) -> None:
    """Uploads the files that have grown; UserError if that fails."""
    with self._lock:
      for path in sorted(self.folder.rglob('*')):
        if not path.is_file():
          continue
        data = path.read_bytes()
        if self._sent.get(path) == len(data):
          continue
        name = path.relative_to(self.folder).as_posix()
        files.write_atomically(self._target / name, data)
        self._sent[path] = len(data)

  def close(self) -> None:
    """Uploads what is left, and ends the thread."""
    self._ended.set()
    self._thread.join()
    try:
      self.now()
    finally:
      self._temporary.cleanup()

  def _run(self) -> None:
    while not self._ended.wait(UPLOAD_EVERY):
      # A store that is away for a while ends no training: the next upload has
      # everything, and a save would notice.
      try:
        self.now()
      except errors.UserError as error:
        logging.warning('the log is not uploaded: %s', error)


def _tensorboard(folder: pathlib.Path, purge_step: int) -> Any:
  """Opens a TensorBoard writer; without its package, says so, returns None.

  Args:
    folder: directory of the event files.
    purge_step: step from which earlier events are void.
  """
  # Here and not above: an optional package, and slow to import.
  try:
    import tensorboardX
  except ImportError:
    sys.stderr.write(
      'tensorboardX is not installed: metrics go to metrics.jsonl alone; pip '
      'install tensorboardX for TensorBoard files\n'
    )
    return None
  return tensorboardX.SummaryWriter(
    str(folder), purge_step=purge_step, flush_secs=30
  )


def _lines_until(path: files.Path, step: int) -> list[str]:
  """Returns the lines of a log up to `step`, or up to the first torn one.

  A line is torn where a run was killed while writing it.
  """
  kept = []
  for line in path.read_bytes().splitlines():
    try:
      line_step = int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
      break
    if line_step <= step:
      kept.append(line.decode())
  return kept


def note(*lines: str, everywhere: bool = False) -> None:
  """Prints lines to standard error: of the first process, or of each one."""
  if everywhere or not jax.process_index():
    terminal = _Lasting()
    terminal.write(''.join(f'{line}\n' for line in lines))
    terminal.flush()


class Progress:
  """Shows progress on standard error: a bar on a terminal, else plain lines."""

  def __init__(
    self, total: int, *, start: int, name: str, silent: bool = False
  ):
    """Starts the display.

    Args:
      total: updates of the whole run.
      start: updates made in earlier sessions.
      name: shown in front.
      silent: show nothing, as on all processes but the first.
    """
    self._silent = silent
    self._bar = tqdm.tqdm(
      total=total,
      initial=start,
      desc=name,
      unit='step',
      dynamic_ncols=True,
      disable=silent or not sys.stderr.isatty(),
      file=_Lasting(),
    )
    self._name, self._total = name, total
    self._start, self._began = start, time.monotonic()

  def advance(self) -> None:
    """Counts one more update."""
    self._bar.update()

  def show(self, step: int, values: Mapping[str, str]) -> None:
    """Shows the newest values, and the time left."""
    if not self._bar.disable:
      self._bar.set_postfix(values, refresh=False)
      return
    # The bar estimates the time left by itself; plain lines need it computed,
    # from the updates of this session alone.
    elapsed = time.monotonic() - self._began
    left = elapsed / max(step - self._start, 1) * (self._total - step)
    shown = '  '.join(f'{name} {value}' for name, value in values.items())
    self.note(f'step {step}/{self._total}  {shown}  left {_duration(left)}')

  def note(self, text: str) -> None:
    """Prints a line that stays above the bar."""
    if self._silent:
      return
    line, terminal = f'{self._name}: {text}', _Lasting()
    if self._bar.disable:
      terminal.write(line + '\n')
      terminal.flush()
    else:
      self._bar.write(line, file=terminal)

  def close(self) -> None:
    """Ends the display; a bar stays as it is."""
    self._bar.close()


class _Lasting:
  """Standard error, or nothing once it is gone.

  A terminal that was closed refuses what is written, and the training has a
  state to save before it ends.
  """

  def write(self, text: str) -> None:
    with contextlib.suppress(OSError):
      sys.stderr.write(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      sys.stderr.flush()

  def __getattr__(self, name: str) -> Any:
    """Everything else, such as its width."""
    return getattr(sys.stderr, name)


def _duration(seconds: float) -> str:
  """Formats a duration as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


def seconds(path: files.Path) -> float:
  """Returns the seconds of training behind a log, over all its sessions."""
  total = last = 0.0
  for line in _lines_until(path, sys.maxsize):
    now = json.loads(line).get('seconds')
    # Every session counts from 0, so a smaller number begins another one.
    if now is not None:
      total += now - last if now >= last else now
      last = now
  return total
