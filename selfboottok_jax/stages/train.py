"""A training from its configuration to its last checkpoint."""

import contextlib

import jax
import ml_collections
from absl import logging
from jaxtyping import PyTree

from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import cost
from selfboottok_jax.stages import inputs, registry
from selfboottok_jax.stages.programs import TrainPrograms
from selfboottok_jax.training import (
  checkpointing,
  loop,
  processes,
  sharding,
  workdirs,
)
from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import state as state_lib


def train(
  config: ml_collections.ConfigDict, workdir: str
) -> state_lib.TrainState:
  """Trains, or continues to train, in `workdir`.

  Everything that can be wrong with the configuration, the data and the workdir
  is found before anything is written.
  """
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  with processes.all_or_none():
    source = inputs.open_data(config, 'train')
  built = registry.build(config, source, mesh)
  meta = built.meta | {
    'seed': config.train.seed,
    'batch_size': config.data.batch_size,
    'data_fingerprint': source.fingerprint,
  }
  resolved = config.to_dict() | {'model': built.model_fields}
  with processes.all_or_none():
    latest = _check_workdir(config, resolved, workdir)
  programs = TrainPrograms(config, built.task, built.optimizers, mesh)
  if latest is None:
    state = built.start(programs.init())
  checkpointer = checkpointing.Checkpointer(
    workdir, max_to_keep=config.checkpoint.max_to_keep
  )
  with contextlib.closing(checkpointer):
    if latest is not None:
      state = _resume(programs.state, checkpointer, latest, meta)
    if jax.process_index() == 0:
      workdirs.write_config(workdir, resolved)
      _keep_card(programs, workdir)
      programs.on_compile = lambda: _keep_card(programs, workdir)
    frozen = place(built.task.frozen, mesh)
    return _run(
      config, built, state, programs, frozen, source, mesh, checkpointer,
      meta, workdir,
    )  # fmt: skip


def place(tree: PyTree, mesh) -> PyTree:
  """Puts frozen parameters where the shape rule says."""
  return jax.device_put(tree, sharding.tree_shardings(tree, mesh))


def _keep_card(programs: TrainPrograms, workdir: str) -> None:
  """Writes what the training costs; what was known before stays."""
  try:
    card = programs.card()
  except ValueError as error:
    # Of no consequence to the training itself.
    logging.warning('no cost card: %s', error)
    return
  with contextlib.suppress(errors.UserError):
    card = cost.complete(card, cost.read(workdir))
  cost.write(card, workdir)


def _check_workdir(config, resolved, workdir) -> int | None:
  """The step to continue from, or None; raises where training cannot."""
  files.check_folder('workdir', workdir)
  workdirs.check_config(workdir, resolved)
  latest = workdirs.latest_step(workdir)
  if latest is not None and latest > config.train.steps:
    raise errors.CheckpointError(
      f'train.steps={config.train.steps}, but --workdir={workdir} is at step '
      f'{latest} already; set train.steps to that or more, or choose another '
      '--workdir'
    )
  return latest


def _resume(abstract, checkpointer, latest, meta):
  """The saved state."""
  state, saved = checkpointer.restore(abstract, latest)
  for key, value in meta.items():
    if saved.get(key) != value:
      raise errors.CheckpointError(
        f'the checkpoint at step {latest} was made with {key}='
        f'{str(saved.get(key))[:60]}, this run has {str(value)[:60]}; restore '
        'what changed, or choose another --workdir'
      )
  return state


def _run(
  config, built, state, programs, frozen, source, mesh, checkpointer, meta,
  workdir,
):  # fmt: skip
  step = int(state.step)
  first = jax.process_index() == 0
  batches = inputs.train_batches(config, source, start_step=step)
  # Closed on errors too: TensorBoard's thread outlives the main one, and
  # would follow the error with a traceback of its own.
  writer = (
    contextlib.closing(logging_lib.MetricsWriter(workdir, start_step=step))
    if first
    else contextlib.nullcontext()
  )
  schedule = loop.Schedule(
    steps=config.train.steps,
    log_every=config.train.log_every,
    evaluate_every=config.evaluation.every,
    save_every=config.checkpoint.every,
  )
  with contextlib.closing(batches), jax.set_mesh(mesh), writer as log:
    return loop.run(
      state,
      programs,
      frozen,
      batches,
      name=config.task,
      schedule=schedule,
      mesh=mesh,
      checkpointer=checkpointer,
      meta=meta,
      evaluators=built.evaluators(frozen),
      writer=log,
    )
