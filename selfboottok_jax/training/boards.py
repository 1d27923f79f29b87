"""Boards that show a training while it runs: TensorBoard, Weights & Biases.

Names of metrics are tags, whose first part is their group; those without a
group are in the group 'train'.
"""

import json
import os
import sys
import tempfile
import uuid
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from selfboottok_jax import errors, files, trees

# The file of a workdir that names its run at Weights & Biases.
WANDB = 'wandb.json'


@runtime_checkable
class Board(Protocol):
  """Shows numbers and pictures by step."""

  def numbers(self, step: int, values: Mapping[str, float]) -> None:
    """Adds the numbers of a step."""

  def picture(
    self, step: int, tag: str, image: UInt8[np.ndarray, 'h w 3']
  ) -> None:
    """Adds a picture."""

  def close(self) -> None:
    """Sends what is left."""


def tag(name: str) -> str:
  """Returns the name of a metric with its group."""
  return name if '/' in name else f'train/{name}'


class TensorBoard:
  """Event files for TensorBoard, written by tensorboardX."""

  def __init__(self, writer: Any, config: Mapping[str, Any]):
    """Shows a configuration as text; see `open_tensorboard`."""
    self._writer = writer
    if config:
      rows = (f'| {k} | {v} |' for k, v in trees.flatten(config).items())
      text = '\n'.join(['| key | value |', '| --- | --- |', *rows])
      writer.add_text('config', text, 0)

  def numbers(self, step: int, values: Mapping[str, float]) -> None:
    """Adds the numbers of a step."""
    for name, value in values.items():
      self._writer.add_scalar(tag(name), value, step)

  def picture(
    self, step: int, tag: str, image: UInt8[np.ndarray, 'h w 3']
  ) -> None:
    """Adds a picture."""
    self._writer.add_image(tag, image, step, dataformats='HWC')

  def close(self) -> None:
    """Writes what is left."""
    self._writer.close()


def open_tensorboard(
  folder: os.PathLike[str], purge_step: int, config: Mapping[str, Any]
) -> TensorBoard | None:
  """Opens event files; without tensorboardX, says so and returns None.

  Args:
    folder: directory of the event files.
    purge_step: step from which earlier events are void.
    config: is shown as text.
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
  writer = tensorboardX.SummaryWriter(
    str(folder), purge_step=purge_step, flush_secs=30
  )
  return TensorBoard(writer, config)


def import_wandb(project: str) -> Any:
  """Imports the package `wandb`; ConfigError without it."""
  try:
    import wandb
  except ImportError as error:
    raise errors.ConfigError(
      f'log.wandb={project}, and wandb is not installed; pip install wandb, or '
      "set --config.log.wandb=''"
    ) from error
  return wandb


class WeightsAndBiases:
  """A run at Weights & Biases, which a training that continues goes on with."""

  def __init__(
    self, project: str, workdir: files.Path, config: Mapping[str, Any]
  ):
    """Opens the run that the workdir names, or a new one.

    Args:
      project: PROJECT or ENTITY/PROJECT.
      workdir: folder of the training; its name is that of the run.
      config: the resolved configuration.

    Raises:
      ConfigError: the run cannot be opened, as nobody is logged in.
    """
    self._wandb = import_wandb(project)
    entity, _, name = project.rpartition('/')
    place = workdir / WANDB
    record: Any = {}
    if files.exists(place):
      try:
        record = json.loads(place.read_text())
      except ValueError as error:
        raise errors.ConfigError(
          f'{place} is damaged ({error}); remove it to begin another run there'
        ) from error
    if record.get('project') != project:
      record = {'project': project, 'id': uuid.uuid4().hex[:12]}
    remote = files.is_remote(workdir)
    try:
      self._run = self._wandb.init(
        entity=entity or None,
        project=name,
        id=record['id'],
        name=workdir.name,
        resume='allow',
        dir=tempfile.gettempdir() if remote else str(workdir),
        config=dict(config),
      )
    # Network, credentials and settings have errors of their own.
    except Exception as error:
      reason = ' '.join(str(error).split())[:200]
      raise errors.ConfigError(
        f'log.wandb={project} cannot be opened ({reason}); wandb login, set '
        "WANDB_MODE=offline, or --config.log.wandb=''"
      ) from error
    files.write_json(place, record)
    # An axis of our own: W&B drops steps that are not after its last one, and
    # a training that continues from an older checkpoint has such.
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def numbers(self, step: int, values: Mapping[str, float]) -> None:
    """Adds the numbers of a step."""
    tagged = {tag(name): value for name, value in values.items()}
    self._run.log({'step': step, **tagged})

  def picture(
    self, step: int, tag: str, image: UInt8[np.ndarray, 'h w 3']
  ) -> None:
    """Adds a picture."""
    self._run.log({'step': step, tag: self._wandb.Image(image)})

  def close(self) -> None:
    """Waits until all is sent."""
    self._run.finish()
