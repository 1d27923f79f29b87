"""The workdir of a run: the configuration it holds, and whether it may go on.

`config.json` is written before the first step; `checkpoints/STEP/`, a folder
for each step that was saved, is what `checkpointing` writes and reads.
"""

import json
import pathlib
from typing import Any

import orbax.checkpoint as ocp

from selfboottok_jax import errors, trees

CONFIG = 'config.json'
FOLDER = 'checkpoints'
# A run that continues may change how long, how often and where it runs.
MAY_CHANGE = (
  'train.steps',
  'train.log_',
  'evaluation.',
  'checkpoint.',
  'mesh.',
  # What these name is compared by its fingerprint.
  'data.path',
  'data.cache',
  'data.num_',
  'tokenizer',
  'networks.frechet',
  'sampling.',
  'assumed.',
  # How the model is computed; the same but for rounding.
  'model.attention',
  'model.remat',
  'model.unroll',
)


def read_config(
  workdir: str, what: str, *, task: str | None = None
) -> dict[str, Any]:
  """The configuration a workdir was trained with, as nested dicts.

  Args:
    workdir: folder of a training.
    what: the flag or key that named it, for errors.
    task: the task it must be of ('tokenizer' also takes a scaled one).

  Raises:
    CheckpointError: the folder is no run, is damaged, or of another task.
  """
  path = pathlib.Path(workdir) / CONFIG
  if not path.is_file():
    raise errors.CheckpointError(
      f'{what}={workdir} is no run: it has no {CONFIG}; wanted the --workdir '
      'of a training'
    )
  try:
    config = json.loads(path.read_text())
  except ValueError as error:  # no JSON, or not even text
    raise errors.CheckpointError(
      f'{path} is damaged ({error}); restore it or train anew'
    ) from error
  if not isinstance(config, dict) or 'task' not in config:
    raise errors.CheckpointError(
      f'{path} is damaged (it names no task); restore it or train anew'
    )
  accepted = {'tokenizer': ('tokenizer', 'scaling'), None: (config['task'],)}
  if config['task'] not in accepted.get(task, (task,)):
    raise errors.CheckpointError(
      f'{what}={workdir} is a run of task {config["task"]!r}; wanted a run of '
      f'task {task!r}'
    )
  return config


def latest_step(workdir: str) -> int | None:
  """The newest whole checkpoint of a workdir that may not even exist.

  One process of several may ask alone: opening a manager would wait for all.
  """
  folder = pathlib.Path(workdir) / FOLDER
  steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
  return max(steps, default=None)


def check_config(workdir: str, config: dict[str, Any]) -> None:
  """Checks a configuration against that of the run in a workdir, if any.

  A run that ended before its first checkpoint, for want of memory perhaps, may
  be begun again with other values.

  Raises:
    CheckpointError: the workdir belongs to another configuration.
  """
  if not (pathlib.Path(workdir) / CONFIG).exists():
    return
  config_there = read_config(workdir, '--workdir')
  if latest_step(workdir) is None:
    return
  if 'imported' in config_there and 'imported' not in config:
    raise errors.CheckpointError(
      f'--workdir={workdir} holds weights that were imported, and nothing to '
      'continue; choose another --workdir, and --config.init_from='
      f'{workdir} to fine-tune them'
    )
  stored = trees.flatten(config_there)
  given = trees.flatten(json.loads(json.dumps(config)))
  changed = sorted(
    key
    for key in stored.keys() | given.keys()
    if stored.get(key) != given.get(key) and not key.startswith(MAY_CHANGE)
  )
  if changed:
    details = ', '.join(
      f'{key}: {stored.get(key)!r} there, {given.get(key)!r} given'
      for key in changed[:4]
    )
    more = f' and {len(changed) - 4} more' if len(changed) > 4 else ''
    raise errors.CheckpointError(
      f'--workdir={workdir} holds a run of another configuration '
      f'({details}{more}); choose another --workdir, or the same values'
    )


def write_config(workdir: str, config: dict[str, Any]) -> None:
  """Stores the configuration, once it has passed `check_config`."""
  check_config(workdir, config)
  folder = pathlib.Path(workdir)
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / CONFIG
  partial = path.with_suffix('.json.partial')
  partial.write_text(json.dumps(config, indent=2, sort_keys=True) + '\n')
  partial.replace(path)
