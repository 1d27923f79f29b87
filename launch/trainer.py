"""A training from its configuration to its last checkpoint."""

import contextlib

import chex
import jax
import ml_collections
import numpy as np
from jaxtyping import PyTree

from launch import builders, cli
from launch.builders import common
from selfboottok_jax import data, errors, tasks
from selfboottok_jax.training import checkpointing, loop, sharding
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
  source = common.open_data(config, 'train')
  built = builders.build(config, source, mesh)
  meta = built.meta | {
    'seed': config.train.seed,
    'batch_size': config.data.batch_size,
    'data_fingerprint': source.fingerprint,
  }
  resolved = config.to_dict() | {'model': built.model_fields}
  latest = _check_workdir(config, resolved, workdir)
  abstract = sharding.place_abstractly(
    jax.eval_shape(make_init(config, built)), mesh
  )
  shardings = sharding.tree_shardings(abstract, mesh)
  programs = make_programs(config, built, mesh, shardings)
  _trace(programs, config, built, mesh, abstract)
  if latest is None:
    init = jax.jit(make_init(config, built), out_shardings=shardings)
    state = built.start(init())
  checkpointer = checkpointing.Checkpointer(
    workdir, max_to_keep=config.checkpoint.max_to_keep
  )
  with contextlib.closing(checkpointer):
    if latest is not None:
      state = _resume(abstract, checkpointer, latest, meta)
    if jax.process_index() == 0:
      checkpointing.write_config(workdir, resolved)
    frozen = place(built.task.frozen, mesh)
    step_fn = _choose_by_step(programs)
    return _run(
      config, built, state, step_fn, frozen, source, mesh, checkpointer,
      meta, workdir,
    )  # fmt: skip


def make_programs(config, built, mesh, shardings):
  """{first step: jitted train step}, one for each phase of the task.

  The state is donated. Each is traced once: another shape or type later on is
  an error.
  """
  # chex counts all that is made here together, in every call.
  chex.clear_trace_counter()
  return {
    first: jax.jit(
      chex.assert_max_traces(
        state_lib.make_train_step(
          built.task.losses(first),
          built.optimizers,
          seed=config.train.seed,
          ema_limit=config.train.ema,
        ),
        n=len(built.task.milestones),
      ),
      out_shardings=(shardings, sharding.replicated(mesh)),
      donate_argnums=0,
    )
    for first in built.task.milestones
  }


def _trace(programs, config, built, mesh, abstract) -> None:
  """Finds what does not fit together before anything is written.

  The programs keep the trace for when they are called.
  """
  size, count = config.data.image_size, config.data.batch_size
  rows = sharding.batch_sharding(mesh)
  batch = {
    'image': jax.ShapeDtypeStruct(
      (count, size, size, 3), np.float32, sharding=rows
    ),
    'label': jax.ShapeDtypeStruct((count,), np.int32, sharding=rows),
  }
  frozen = sharding.place_abstractly(built.task.frozen, mesh)
  with jax.set_mesh(mesh):
    for program in programs.values():
      program.eval_shape(abstract, frozen, batch)


def _choose_by_step(programs):
  """Returns step_fn(state, frozen, batch, step).

  `step` is the number of updates made so far, as the host counts them. From a
  program's second call on nothing crosses between host and device in a step.
  """
  compiled = set()

  def step_fn(state, frozen, batch, step):
    phase = max(first for first in programs if first <= step)
    # Compiling puts constants on the device.
    guard = 'disallow' if phase in compiled else 'allow'
    compiled.add(phase)
    with jax.transfer_guard(guard):
      return programs[phase](state, frozen, batch)

  return step_fn


def make_init(config, built):
  """Returns init() -> a fresh state; traceable."""

  def init() -> state_lib.TrainState:
    params, stats = built.task.init(jax.random.key(config.train.seed))
    return state_lib.init_state(
      params, stats, built.optimizers, built.task.ema_groups
    )

  return init


def place(tree: PyTree, mesh) -> PyTree:
  """Puts frozen parameters where the shape rule says."""
  return jax.device_put(tree, sharding.tree_shardings(tree, mesh))


def _check_workdir(config, resolved, workdir) -> int | None:
  """The step to continue from, or None; raises where training cannot."""
  cli.check_folder('workdir', workdir)
  checkpointing.check_config(workdir, resolved)
  latest = checkpointing.latest_step(workdir)
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
  config, built, state, step_fn, frozen, source, mesh, checkpointer, meta,
  workdir,
):  # fmt: skip
  step = int(state.step)
  first = jax.process_index() == 0
  batches = data.make_train_dataset(
    source,
    batch_size=config.data.batch_size,
    image_size=config.data.image_size,
    seed=config.train.seed,
    start_step=step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    max_scale=None if config.data.augment else 1.0,
    flip=config.data.augment,
    random_crop=config.data.augment,
  )
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
      step_fn,
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


def describe(config: ml_collections.ConfigDict) -> None:
  """Prints what a run would train, without allocating or writing it."""
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  source = common.open_data(config, 'train')
  built = builders.build(config, source, mesh)
  abstract = jax.eval_shape(make_init(config, built))
  lines = [f'data: {data.describe(source)}']
  for group, modules in abstract.params.items():
    kind = 'trained' if group in built.task.groups else 'frozen'
    for name, module in modules.items():
      lines.append(f'{group}/{name}: {tasks.count(module):,} {kind}')
  for name, network in built.task.frozen.items():
    lines.append(f'frozen network {name}: {tasks.count(network):,}')
  trained = sum(tasks.count(abstract.params[g]) for g in built.task.groups)
  lines.append(f'trained parameters: {trained:,}')
  cli.say('\n'.join(lines))
