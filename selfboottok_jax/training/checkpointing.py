"""Checkpoints of a workdir: written while training, read by everything else.

A checkpoint is a folder `checkpoints/STEP/` of three items: `model`
(parameters, running means, statistics), `optimizer`, and `meta` (step, seed,
data fingerprint, batch size). Orbax writes to a temporary name and renames it,
so a folder is whole or absent.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from selfboottok_jax import errors
from selfboottok_jax.training import state as state_lib
from selfboottok_jax.training import workdirs


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished or running training, read from its workdir.

  Attributes:
    workdir: where it was read from.
    config: its configuration, as nested dicts.
    step: updates made when the checkpoint was written.
    params: parameters by group.
    ema: running means by group.
    stats: statistics without a gradient.
    meta: what else was saved with it (seed, data fingerprint, class names).
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
    """Opens `workdir`/checkpoints, creating it where it is absent."""
    self._manager = ocp.CheckpointManager(
      pathlib.Path(workdir).resolve() / workdirs.FOLDER,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep, enable_async_checkpointing=True
      ),
    )

  def latest_step(self) -> int | None:
    """The newest whole checkpoint, or None."""
    return self._manager.latest_step()

  def save(self, state: state_lib.TrainState, meta: dict[str, Any]) -> None:
    """Starts a save; the arrays are copied before this returns."""
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    model = {'params': state.params, 'ema': state.ema, 'stats': state.stats}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(model),
        optimizer=ocp.args.StandardSave({'opt': state.opt}),
        meta=ocp.args.JsonSave({**meta, 'step': step}),
      ),
    )

  def restore(
    self, abstract: state_lib.TrainState, step: int
  ) -> tuple[state_lib.TrainState, dict[str, Any]]:
    """The state at `step`, placed as the leaves of `abstract` say."""
    model = {
      'params': abstract.params,
      'ema': abstract.ema,
      'stats': abstract.stats,
    }
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardRestore(model),
        optimizer=ocp.args.StandardRestore({'opt': abstract.opt}),
        meta=ocp.args.JsonRestore(),
      ),
    )
    placed = jax.device_put(
      jax.numpy.asarray(step, jax.numpy.int32), abstract.step.sharding
    )
    state = state_lib.TrainState(
      step=placed, opt=restored['optimizer']['opt'], **restored['model']
    )
    return state, restored['meta']

  def wait(self) -> None:
    """Returns once everything that was saved is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for pending saves and releases the folder."""
    self._manager.close()


def read_run(workdir: str, *, what: str, task: str | None = None) -> Run:
  """Reads the newest checkpoint of a workdir, without its optimiser.

  Args:
    workdir: folder of a training.
    what: the flag or key that named it, for errors.
    task: the task it must have been trained for ('tokenizer' also takes a
      scaled one).

  Returns:
    The run, its arrays on the host.
  """
  config = workdirs.read_config(workdir, what, task=task)
  step = workdirs.latest_step(workdir)
  if step is None:
    raise errors.CheckpointError(
      f'{what}={workdir} has no checkpoint yet; wait for its first save, or '
      'train it'
    )
  model = _read_arrays(workdir, step, 'model')
  with _reader() as reader:
    path = _path(workdir, step)
    meta = reader.restore(
      path, ocp.args.Composite(meta=ocp.args.JsonRestore())
    )['meta']
  return Run(workdir, config, step, meta=meta, **model)


def read_optimizer(workdir: str, step: int) -> dict[str, PyTree]:
  """The optimiser states by group of a checkpoint, as plain containers."""
  return _read_arrays(workdir, step, 'optimizer')['opt']


def _path(workdir: str, step: int) -> pathlib.Path:
  return pathlib.Path(workdir).resolve() / workdirs.FOLDER / str(step)


def _reader() -> ocp.Checkpointer:
  """Reads without the log lines of a manager that may not write."""
  return ocp.Checkpointer(
    ocp.CompositeCheckpointHandler(
      model=ocp.StandardCheckpointHandler(),
      optimizer=ocp.StandardCheckpointHandler(),
      meta=ocp.JsonCheckpointHandler(),
    )
  )


def _read_arrays(workdir: str, step: int, item: str) -> PyTree:
  """One item as it lies on disk, as host arrays.

  Arrays on a device could not be placed on a mesh of several hosts.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  path = _path(workdir, step)
  with _reader() as reader:
    metadata = reader.metadata(path).item_metadata[item]
    abstract = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      metadata.tree if hasattr(metadata, 'tree') else metadata,
    )
    restored = reader.restore(
      path, ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
    )
  return jax.device_get(restored[item])
