"""Reading and writing a run on disk: its configuration and its checkpoints.

A workdir holds `config.json`, written before the first step, and a folder
`checkpoints/STEP/` for each step that was saved, with three items: `model`
(parameters, running means, statistics), `optimizer`, and `meta` (step, seed,
data fingerprint, batch size). Orbax writes to a temporary name and renames it,
so a folder is either complete or absent. In an object store, where nothing can
be renamed, it writes `commit_success.txt` last, and a folder without it counts
as absent.
"""

import dataclasses
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from selfboottok_jax import errors, files, trees
from selfboottok_jax.training import state as state_lib

CONFIG = 'config.json'
FOLDER = 'checkpoints'
# Prefixes of the keys that may differ when a run continues: those that decide
# how long, how often and where it runs.
MAY_CHANGE = (
  'train.steps',
  'train.log_',
  'evaluation.',
  'log.',
  'checkpoint.',
  'mesh.',
  # Paths may move; what they lead to is compared by its fingerprint.
  'data.path',
  'data.cache',
  'data.num_',
  # Whether pictures are turned upright is part of the fingerprint too.
  'data.exif',
  'data.bad',
  'data.max_pixels',
  'tokenizer',
  'networks.frechet',
  'sampling.',
  'assumed.',
  # These change how the model is computed, but results only by rounding.
  'model.attention',
  'model.remat',
  'model.unroll',
)


# Keys that runs of earlier versions lack, and what they did.
ADDED = {
  'train.accumulate': 1,
  'model.residual_dtype': '',
  'model.local_input': 'codes',
}


def read_config(
  workdir: str, what: str, *, task: str | None = None
) -> dict[str, Any]:
  """Reads the configuration that a workdir was trained with.

  Args:
    workdir: folder of a training.
    what: the flag or key that named it, for errors.
    task: the task that it must be of; any by default. 'tokenizer' also accepts
      a scaled one.

  Returns:
    The configuration, as nested dicts.

  Raises:
    CheckpointError: the folder is no run, is damaged, or is of another task.
  """
  path = files.as_path(workdir) / CONFIG
  with files.reaching(path):
    text = path.read_bytes() if path.is_file() else None
  if text is None:
    raise errors.CheckpointError(
      f'{what}={workdir} is no run: it has no {CONFIG}; wanted the --workdir '
      'of a training'
    )
  try:
    config = json.loads(text)
  except ValueError as error:  # no JSON, or not even text
    raise errors.CheckpointError(
      f'{path} is damaged ({error}); restore it or train anew'
    ) from error
  if not isinstance(config, dict) or 'task' not in config:
    raise errors.CheckpointError(
      f'{path} is damaged (it names no task); restore it or train anew'
    )
  # A scaled tokenizer is a tokenizer to everything that reads it.
  accepted = {'tokenizer': ('tokenizer', 'scaling'), None: (config['task'],)}
  if config['task'] not in accepted.get(task, (task,)):
    raise errors.CheckpointError(
      f'{what}={workdir} is a run of task {config["task"]!r}; wanted a run of '
      f'task {task!r}'
    )
  return config


def kept_steps(workdir: str) -> list[int]:
  """Returns the steps of all complete checkpoints in ascending order.

  The workdir need not exist. A single process of several may call this.
  """
  # Not by a checkpoint manager, which waits for all processes when it opens.
  folder = files.as_path(workdir) / FOLDER
  with files.reaching(folder):
    # Orbax would take a store that cannot be reached for an absent folder.
    is_there = bool(files.children(folder))
    return sorted(ocp.utils.checkpoint_steps(folder)) if is_there else []


def latest_step(workdir: str) -> int | None:
  """Returns the newest complete checkpoint's step; None without one."""
  return max(kept_steps(workdir), default=None)


def check_config(workdir: str, config: dict[str, Any]) -> None:
  """Checks that a configuration may continue the run in a workdir, if any.

  A run without a checkpoint, because it ran out of memory perhaps, may be
  started again with other values.

  Raises:
    CheckpointError: the workdir has a checkpoint of another configuration, or
      imported weights.
  """
  if not files.exists(files.as_path(workdir) / CONFIG):
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
  # Through JSON, so that tuples compare equal to the lists they are stored as.
  stored, given = (
    {
      key: value
      for key, value in (ADDED | trees.flatten(content)).items()
      if not key.startswith(MAY_CHANGE)
    }
    for content in (config_there, json.loads(json.dumps(config)))
  )
  if changed := trees.differences(stored, given):
    raise errors.CheckpointError(
      f'--workdir={workdir} holds a run of another configuration '
      f'({changed}); choose another --workdir, or the same values'
    )


def write_config(workdir: str, config: dict[str, Any]) -> None:
  """Writes the configuration to a workdir, once `check_config` accepts it."""
  check_config(workdir, config)
  path = files.make_folder(workdir) / CONFIG
  # Sorted, so that equal runs have equal files.
  files.write_json(path, config, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or running training, read from its workdir.

  Attributes:
    workdir: folder that it was read from.
    config: its configuration, as nested dicts.
    step: updates made when the checkpoint was written.
    params: parameters by group.
    ema: running means of the parameters by group.
    stats: statistics without a gradient.
    meta: further values saved with it (seed, data fingerprint, class names).
  """

  workdir: str
  config: dict[str, Any]
  step: int
  params: dict[str, PyTree]
  ema: dict[str, PyTree]
  stats: dict[str, PyTree]
  meta: dict[str, Any]


class Checkpointer:
  """Saves and restores the state of one training."""

  def __init__(self, workdir: str, *, max_to_keep: int):
    """Opens `workdir`/checkpoints, and creates it if it is absent.

    Args:
      workdir: folder of a training.
      max_to_keep: checkpoints that stay; older ones are deleted.
    """
    # Orbax refuses relative paths.
    folder = files.absolute(workdir) / FOLDER
    self._is_remote = files.is_remote(folder)
    # It also asks what kind of bucket this is.
    with files.reaching(folder):
      self._manager = ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=max_to_keep, enable_async_checkpointing=True
        ),
      )

  def save(self, state: state_lib.TrainState, meta: dict[str, Any]) -> None:
    """Starts to save a state, unless its step is saved already.

    Writing goes on in the background. The arrays are copied before this
    returns, so that the next step may reuse their memory.
    """
    step = int(state.step)
    # A step always has the same state; saving it again would be waste.
    if self._manager.latest_step() == step:
      return
    # The optimiser is an item of its own: its two moments are twice the size of
    # the parameters, and inference need not read them.
    model = {'params': state.params, 'ema': state.ema, 'stats': state.stats}
    items: dict[str, Any] = {
      'model': ocp.args.StandardSave(model),
      'meta': ocp.args.JsonSave({**meta, 'step': step}),
    }
    if self._has_optimizer(state):
      items['optimizer'] = ocp.args.StandardSave({'opt': state.opt})
    self._manager.save(step, args=ocp.args.Composite(**items))

  def restore(
    self, abstract: state_lib.TrainState, step: int
  ) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """Restores the state saved at `step`.

    Args:
      abstract: the shape, type and sharding of every leaf; the mesh may differ
        from the one that saved.
      step: a step that was saved.

    Returns:
      The state, placed as `abstract` says, and the values saved beside it.
    """
    model = {
      'params': abstract.params,
      'ema': abstract.ema,
      'stats': abstract.stats,
    }
    items: dict[str, Any] = {
      'model': ocp.args.StandardRestore(model),
      'meta': ocp.args.JsonRestore(),
    }
    opt = abstract.opt
    if self._has_optimizer(abstract):
      items['optimizer'] = ocp.args.StandardRestore({'opt': opt})
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    if 'optimizer' in items:
      opt = restored['optimizer']['opt']
    # The step is stored as a number in `meta` and by the folder's name.
    placed = jax.device_put(
      jax.numpy.asarray(step, jax.numpy.int32), abstract.step.sharding
    )
    state = state_lib.TrainState(step=placed, opt=opt, **restored['model'])
    return state, restored['meta']

  def _has_optimizer(self, state: state_lib.TrainState) -> bool:
    """True if the optimiser is an item of the checkpoint.

    In an object store an item without arrays has no objects either, and Orbax
    takes it for one that was lost.
    """
    return not self._is_remote or bool(jax.tree.leaves(state.opt))

  def wait(self) -> None:
    """Waits until everything that was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for pending saves and releases the folder."""
    self._manager.close()


def read_run(
  workdir: str,
  *,
  what: str,
  task: str | None = None,
  step: int | None = None,
  ema: bool = True,
) -> Run:
  """Reads a checkpoint of a workdir, without its optimiser.

  Args:
    workdir: folder of a training.
    what: the flag or key that named it, for errors.
    task: the task that it must be of; any by default. 'tokenizer' also accepts
      a scaled one.
    step: the step of the checkpoint, the newest by default.
    ema: False puts the parameters themselves in place of their running means.

  Returns:
    The run, its arrays on the host.

  Raises:
    CheckpointError: the folder is no run, is damaged, is of another task, or
      has no checkpoint, or none of this step.
  """
  config = read_config(workdir, what, task=task)
  kept = kept_steps(workdir)
  if not kept:
    raise errors.CheckpointError(
      f'{what}={workdir} has no checkpoint yet; wait for its first save, or '
      'train it'
    )
  if step is None:
    step = kept[-1]
  if step not in kept:
    raise errors.CheckpointError(
      f'{what}={workdir} has no checkpoint of step {step}; wanted one of '
      f'{", ".join(map(str, kept))}'
    )
  model = _read_arrays(workdir, step, 'model')
  with _reader() as reader:
    path = _path(workdir, step)
    meta = reader.restore(
      path, ocp.args.Composite(meta=ocp.args.JsonRestore())
    )['meta']
  if not ema:
    model['ema'] = {group: model['params'][group] for group in model['ema']}
  return Run(workdir, config, step, meta=meta, **model)


def read_optimizer(workdir: str, step: int) -> dict[str, PyTree]:
  """Reads the optimiser states of a checkpoint by group, as plain containers.

  Optax's named tuples come back as dicts and lists: the tree on disk does not
  record their types.
  """
  return _read_arrays(workdir, step, 'optimizer')['opt']


def _path(workdir: str, step: int) -> files.Path:
  """Returns the absolute path of a checkpoint, as Orbax needs it."""
  return files.absolute(workdir) / FOLDER / str(step)


def _reader() -> ocp.Checkpointer:
  """Returns a reader of single items, open until it is closed.

  A read-only checkpoint manager would log warnings about what it may not do.
  """
  # Each process reads by itself. By default all would meet after each item, and
  # one that failed before would keep the others waiting.
  here = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=here, active_processes={here}
  )
  return ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
      model=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
      optimizer=ocp.StandardCheckpointHandler(multiprocessing_options=alone),
      meta=ocp.JsonCheckpointHandler(multiprocessing_options=alone),
    ),
    multiprocessing_options=alone,
  )


def _read_arrays(workdir: str, step: int, item: str) -> PyTree:
  """Reads one item of a checkpoint, as host arrays in plain containers.

  Host arrays can be placed on any mesh, unlike arrays on a device of this
  process where the mesh spans several.
  """
  # Orbax would otherwise restore the sharding that was saved, for a mesh that
  # need not exist here.
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  path = _path(workdir, step)
  with _reader() as reader:
    metadata = reader.metadata(path).item_metadata[item]
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      # Orbax may wrap the tree in an object.
      metadata.tree if hasattr(metadata, 'tree') else metadata,
    )
    restored = reader.restore(
      path, ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
    )
  return jax.device_get(restored[item])
