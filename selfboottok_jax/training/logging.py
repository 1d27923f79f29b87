"""Logging: metrics to JSONL and TensorBoard, progress to the terminal."""

import json
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm

from selfboottok_jax import files

METRICS = 'metrics.jsonl'


class MetricsWriter:
  """Writes metrics as JSON lines {"step": ..., name: value} and to TensorBoard.

  Lines of steps after `start_step` are removed first: a run that continues from
  an older checkpoint computes them again.
  """

  def __init__(self, workdir: str, *, start_step: int):
    """Opens the log files in `workdir`, an existing folder.

    Args:
      workdir: folder of a training.
      start_step: updates made so far; 0 for a new run.
    """
    folder = pathlib.Path(workdir)
    path = folder / METRICS
    kept = _lines_until(path, start_step) if path.exists() else []
    # Atomically: an interruption cannot lose the log.
    text = ''.join(f'{line}\n' for line in kept)
    files.write_atomically(path, text.encode())
    # Buffered by line, so a killed run loses no more than its last line.
    self._file = path.open('a', buffering=1)
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

  def close(self) -> None:
    """Flushes and closes both files."""
    self._file.close()
    if self._board is not None:
      self._board.close()


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


def _lines_until(path: pathlib.Path, step: int) -> list[str]:
  """Returns the lines of a log up to `step`, or up to the first torn one.

  A line is torn where a run was killed while writing it.
  """
  kept = []
  for line in path.read_text().splitlines():
    try:
      line_step = int(json.loads(line)['step'])
    except (ValueError, KeyError, TypeError):
      break
    if line_step <= step:
      kept.append(line)
  return kept


def note(*lines: str, everywhere: bool = False) -> None:
  """Prints lines to standard error: of the first process, or of each one."""
  if everywhere or not jax.process_index():
    sys.stderr.write(''.join(f'{line}\n' for line in lines))
    sys.stderr.flush()


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
    line = f'{self._name}: {text}'
    if self._bar.disable:
      sys.stderr.write(line + '\n')
      sys.stderr.flush()
    else:
      self._bar.write(line, file=sys.stderr)

  def close(self) -> None:
    """Ends the display; a bar stays as it is."""
    self._bar.close()


def _duration(seconds: float) -> str:
  """Formats a duration as h:mm:ss."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{seconds:02d}'


def seconds(path: pathlib.Path) -> float:
  """Returns the seconds of training behind a log, over all its sessions."""
  total = last = 0.0
  for line in _lines_until(path, sys.maxsize):
    now = json.loads(line).get('seconds')
    # Every session counts from 0, so a smaller number begins another one.
    if now is not None:
      total += now - last if now >= last else now
      last = now
  return total
