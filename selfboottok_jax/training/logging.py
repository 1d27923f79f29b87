"""Logging: metrics to JSONL and boards, pictures, progress to the terminal."""

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
import numpy as np
import tqdm
from absl import logging
from jaxtyping import UInt8
from PIL import Image

from selfboottok_jax import errors, files
from selfboottok_jax.training import boards

METRICS = 'metrics.jsonl'
# Seconds between two uploads of logs that grow. Stores take one change of an
# object a second, and each sends the whole of it.
UPLOAD_EVERY = 30.0


# Begins the names of what evaluations measure.
EVALUATION = 'val/'

# Names of earlier versions, and what they are now.
RENAMED = {
  **{
    name: f'loss/{name}'
    for name in (
      *('pixel', 'perceptual', 'adversarial', 'kl', 'velocity', 'cosine'),
      *('repa_global', 'repa_local', 'transport', 'alignment', 'cls'),
    )
  },
  'adversarial_weight': 'critic/adversarial_weight',
  'consistency': 'critic/consistency',
  'fusion_alpha': 'fusion/weight_global',
  'logits_fake': 'critic/logits_fake',
  'logits_real': 'critic/logits_real',
  'transport_marginal_error': 'transport/marginal_error',
  'transport_spread': 'transport/token_spread',
}


class MetricsWriter:
  """Writes metrics as JSON lines {"step": ..., name: value}, and to boards.

  Lines of steps after `start_step` are removed first: a run that continues from
  an older checkpoint computes them again.

  Nothing can be appended to an object of an object store. For a workdir there
  the files grow in a temporary folder of this machine, and are uploaded whole
  twice a minute, by `flush` and by `close`.

  Attributes:
    evaluated: whether there is an evaluation of `start_step` in the log.
    newest_evaluation: numbers of the newest evaluation in the log, by name.
  """

  def __init__(
    self,
    workdir: str,
    *,
    start_step: int,
    config: Mapping[str, Any] | None = None,
    pictures_kept: int = 0,
    wandb: str = '',
  ):
    """Opens the log files in `workdir`, an existing folder.

    Args:
      workdir: folder of a training.
      start_step: updates made so far; 0 for a new run.
      config: the resolved configuration, which boards show.
      pictures_kept: files of the newest pictures that stay in the workdir; 0
        writes none, and boards have them all.
      wandb: project at Weights & Biases; '' for none.

    Raises:
      ConfigError: see `boards.WeightsAndBiases`.
    """
    self._workdir = folder = files.as_path(workdir)
    self._pictures_kept = pictures_kept
    path = folder / METRICS
    kept = _lines_until(path, start_step) if files.exists(path) else []
    records = [
      {RENAMED.get(name, name): v for name, v in json.loads(line).items()}
      for line in kept
    ]
    evaluations = [
      record
      for record in records
      if any(name.startswith(EVALUATION) for name in record)
    ]
    self.newest_evaluation = evaluations[-1] if evaluations else {}
    self.evaluated = self.newest_evaluation.get('step') == start_step
    self._boards: list[boards.Board] = []
    if wandb:
      # The first that may fail: it leaves the log as it is.
      self._boards.append(boards.WeightsAndBiases(wandb, folder, config or {}))
    # Atomically: an interruption cannot lose the log.
    text = ''.join(f'{json.dumps(record)}\n' for record in records)
    files.write_atomically(path, text.encode())
    self._upload: _Upload | None = None
    if not isinstance(folder, pathlib.Path):
      self._upload = _Upload(folder)
      folder = self._upload.folder
      (folder / METRICS).write_text(text)
    # Buffered by line, so a killed run loses no more than its last line.
    self._file = (folder / METRICS).open('a', buffering=1)
    board = boards.open_tensorboard(
      folder / 'tensorboard', start_step + 1, config or {}
    )
    if board is not None:
      self._boards.append(board)

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes the metrics of one step as one line.

    Values are Python floats: JSON cannot write arrays.
    """
    self._file.write(json.dumps({'step': step, **metrics}) + '\n')
    for board in self._boards:
      board.numbers(step, metrics)

  def write_picture(
    self, step: int, name: str, picture: UInt8[np.ndarray, 'h w 3']
  ) -> None:
    """Writes the picture of a step as NAME/STEP.png, and shows it on boards.

    Of the files of earlier steps the newest stay. Those of later steps go: they
    were made by a run that continued from an older checkpoint.
    """
    for board in self._boards:
      board.picture(step, f'{EVALUATION}{name}', picture)
    if not self._pictures_kept:
      return
    folder = self._workdir / name
    with files.writing(folder / f'{step}.png') as file:
      Image.fromarray(picture).save(file, 'PNG', optimize=True)
    steps = {
      int(path.stem): path
      for path in files.children(folder)
      if path.suffix == '.png' and path.stem.isdigit()
    }
    newest = sorted(s for s in steps if s <= step)[-self._pictures_kept :]
    for other in set(steps) - set(newest):
      steps[other].unlink()

  def flush(self) -> None:
    """Puts all that was written into the workdir.

    Call it before a state is saved: a run that continues from that state has
    the lines before it then.
    """
    if self._upload is not None:
      self._upload.now()

  def close(self) -> None:
    """Flushes and closes all files and boards."""
    self._file.close()
    for board in self._boards:
      board.close()
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
