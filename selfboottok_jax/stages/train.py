"""A training, from its configuration to its last checkpoint."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from absl import logging

from selfboottok_jax import data, errors, files, sizes
from selfboottok_jax import stages as stages_lib
from selfboottok_jax.evaluation import cost
from selfboottok_jax.stages import (
  checks,
  generator_stage,
  inputs,
  programs,
  tokenizer_stage,
)
from selfboottok_jax.training import checkpointing, loop, processes, sharding
from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import state as state_lib

STAGES: dict[str, Callable[..., stages_lib.Stage]] = {
  'tokenizer': tokenizer_stage.TokenizerStage,
  'scaling': tokenizer_stage.ScalingStage,
  'generator': generator_stage.GeneratorStage,
}


def train(
  config: ml_collections.ConfigDict, workdir: files.Given
) -> state_lib.TrainState:
  """Trains, or continues to train, in a workdir.

  A run that was stopped at any step continues from its last checkpoint, and
  ends with the same bits as one that was not. Everything that can be wrong with
  the configuration, the data and the workdir is found before anything is
  written.

  Args:
    config: of a preset, see `selfboottok_jax.get_config`.
    workdir: folder of the run, made if it is absent; gs://BUCKET/NAME is one
      in Google Cloud Storage.

  Returns:
    The state after the last step.

  Raises:
    UserError: a value, data, weights or a workdir that cannot be used.
    DivergedError: the loss is no longer finite.
    Interrupted: SIGINT, SIGTERM or SIGHUP, after the state was saved.
  """
  workdir = str(workdir)
  checks.check(config)
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch_size(config.data.batch_size, mesh)
  # Each process reads data, other runs and weight files by itself: one that
  # fails must not leave the others waiting in the first collective.
  with processes.all_or_none():
    source = inputs.open_data(config, 'train')
    stage = STAGES[config.task](config, source, mesh)
  meta = stage.meta | {
    'seed': config.train.seed,
    'batch_size': config.data.batch_size,
    'data_fingerprint': source.fingerprint,
  }
  # Fields that the tokenizer and the data decided are stored with the others.
  resolved = config.to_dict() | {'model': stage.model_fields}
  # A square is a number, however it was given.
  resolved['data']['image_size'] = sizes.canonical(config.data.image_size)
  with processes.all_or_none():
    latest = _check_workdir(config, resolved, workdir)
    skipped: list[tuple[data.Source, int]] = []
    # A picture that cannot be read should not end the training at its first
    # evaluation.
    if latest != config.train.steps:
      skipped = inputs.read_through(stage.held_out)
  # Traced before the workdir is touched: what does not fit together, as a depth
  # that no head divides, must not leave a workdir that refuses the right value.
  step_fn = programs.TrainPrograms(config, stage.task, mesh)
  if latest is None:
    state = stage.start(step_fn.init())
  checkpointer = checkpointing.Checkpointer(
    workdir, max_to_keep=config.checkpoint.max_to_keep
  )
  with contextlib.closing(checkpointer):
    if latest is not None:
      state = _resume(step_fn.state, checkpointer, latest, meta, source)
    logging_lib.note(*inputs.describe(config, source))
    # One process writes what all share; checkpoints alone are written by all.
    if jax.process_index() == 0:
      checkpointing.write_config(workdir, resolved)
      _keep_card(step_fn, workdir)
      if isinstance(source, data.PictureSource) and source.picture_set:
        # Those that the listing shows; the third line has their number.
        _write_bad(source.picture_set.bad, workdir)
      # The compiler knows memory and time: the card is completed when it ends.
      step_fn.on_compile = lambda: _keep_card(step_fn, workdir)
    for held_out, index in skipped:
      _keep_bad(held_out, index, workdir)
    # An argument of every step and not a constant in it, so that it is placed
    # once, split like the trained parameters.
    frozen = jax.device_put(
      stage.task.frozen, sharding.tree_shardings(stage.task.frozen, mesh)
    )
    with (
      contextlib.closing(
        inputs.train_batches(
          config,
          source,
          start_step=int(state.step),
          on_skip=lambda index: _keep_bad(source, index, workdir),
        )
      ) as batches,
      # Closed on errors too: TensorBoard's thread outlives the main one, and
      # would follow the error with a traceback of its own.
      _writer(config, resolved, workdir, int(state.step)) as writer,
      jax.set_mesh(mesh),
    ):
      return loop.run(
        state,
        step_fn,
        frozen,
        batches,
        name=config.task,
        schedule=loop.Schedule(
          steps=config.train.steps,
          log_every=config.train.log_every,
          evaluate_every=config.evaluation.every,
          save_every=config.checkpoint.every,
        ),
        mesh=mesh,
        checkpointer=checkpointer,
        meta=meta,
        evaluators=stage.evaluators(frozen),
        # Only the first process has a log.
        evaluated=processes.anywhere(writer is not None and writer.evaluated),
        writer=writer,
        shown=stage.shown,
      )


def _check_workdir(
  config: ml_collections.ConfigDict, resolved: dict[str, Any], workdir: str
) -> int | None:
  """The step to continue from, or None for a fresh run.

  Raises:
    UserError: the workdir cannot be written, or belongs to another run.
  """
  files.check_folder('workdir', workdir)
  checkpointing.check_config(workdir, resolved)
  latest = checkpointing.latest_step(workdir)
  if latest is not None and latest > config.train.steps:
    raise errors.CheckpointError(
      f'train.steps={config.train.steps}, but --workdir={workdir} is at step '
      f'{latest} already; set train.steps to that or more, or choose another '
      '--workdir'
    )
  return latest


def _resume(
  abstract: state_lib.TrainState,
  checkpointer: checkpointing.Checkpointer,
  latest: int,
  meta: dict[str, Any],
  source: data.Source,
) -> state_lib.TrainState:
  """Restores a state; CheckpointError for one of other data or another seed."""
  state, saved = checkpointer.restore(abstract, latest)
  for key, value in meta.items():
    if saved.get(key) != value and not _is_renamed(key, saved, source):
      if (
        key == 'data_fingerprint'
        and isinstance(source, data.PictureSource)
        and _is_renamed(key, saved, source.as_stored())
      ):
        raise errors.CheckpointError(
          f'the checkpoint at step {latest} was made of images as they are '
          'stored, without the orientation of their EXIF data; set '
          '--config.data.exif=False to continue'
        )
      raise errors.CheckpointError(
        f'the checkpoint at step {latest} was made with {key}='
        f'{str(saved.get(key))[:60]}, this run has {str(value)[:60]}; restore '
        'what changed, or choose another --workdir'
      )
  return state


def _is_renamed(
  key: str, saved: Mapping[str, Any], source: data.Source
) -> bool:
  """True for a value that an earlier version had for the same images."""
  if key == 'data_fingerprint':
    return bool(saved.get(key)) and data.is_same(source, saved[key])
  # The class of a tree that has a single one had no name.
  return (
    key == 'class_names' and not saved.get(key) and len(source.class_names) == 1
  )


def _keep_card(step_fn: programs.TrainPrograms, workdir: str) -> None:
  """Writes the cost card; what only an earlier card knows stays in it."""
  try:
    card = step_fn.card()
  except ValueError as error:
    # A program that cannot be counted can still be trained.
    logging.warning('no cost card: %s', error)
    return
  with contextlib.suppress(errors.UserError):
    card = cost.complete(card, cost.read(workdir))
  cost.write(card, workdir)


def _keep_bad(source: data.Source, index: int, workdir: str) -> None:
  """Names an image that was skipped in the log and in the workdir."""
  try:
    source[index]
  except data.PictureError as error:
    logging_lib.note(f'skipped: {error.name}: {error.reason}', everywhere=True)
    _write_bad([data.Bad(error.name, error.reason)], workdir)


def _write_bad(bad: Iterable[data.Bad], workdir: str) -> None:
  """Adds images to the workdir's bad.jsonl, each once; one file a process."""
  path = files.as_path(workdir) / f'bad{jax.process_index() or ""}.jsonl'
  before = path.read_text() if path.exists() else ''
  lines = (json.dumps(dataclasses.asdict(item)) + '\n' for item in bad)
  if new := [line for line in lines if line not in before]:
    files.write_atomically(path, (before + ''.join(new)).encode())


@contextlib.contextmanager
def _writer(
  config: ml_collections.ConfigDict,
  resolved: Mapping[str, Any],
  workdir: str,
  start_step: int,
) -> Iterator[logging_lib.MetricsWriter | None]:
  """The metrics' writer on the first process, None on the others."""
  writer = None
  with processes.all_or_none():
    if jax.process_index() == 0:
      writer = logging_lib.MetricsWriter(
        workdir,
        start_step=start_step,
        config=resolved,
        pictures_kept=config.log.grids_kept,
        wandb=config.log.wandb,
      )
  try:
    yield writer
  finally:
    if writer is not None:
      writer.close()
