"""The trainings of an ablation: rows of presets.ablations at a base.

Nothing is trained here, and no device but the CPU is needed: configurations are
made and checked, and parameters counted from shapes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from selfboottok_jax import errors, presets, sizes, trees
from selfboottok_jax.models import layers
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.presets import ablations
from selfboottok_jax.stages import checks, dry_run, tokenizer_stage

# What the runs of a row decide themselves.
RESERVED = {
  'train.seed': 'use --seeds',
  'task': 'rows say what they train',
  'tokenizer': 'rows train their own',
}
# The largest share by which a decoder of as many parameters may miss them.
TOLERANCE = 0.01


@dataclasses.dataclass(frozen=True)
class Training:
  """A training that one or more rows need.

  Equal ones are the same run.

  Attributes:
    stage: one of `presets.STAGES`.
    preset: of the stage.
    changes: keys and values that differ from the preset's, in their order.
    tokenizer: the training whose tokenizer it starts from, None for stage 1.
  """

  stage: str
  preset: str
  changes: tuple[tuple[str, Any], ...]
  tokenizer: 'Training | None' = None

  @functools.cached_property
  def config(self) -> ml_collections.ConfigDict:
    """The configuration, but for the workdir of the tokenizer and the seed."""
    config = presets.get_config(f'{self.stage}:{self.preset}')
    config.update_from_flattened_dict(dict(self.changes))
    return config

  @functools.cached_property
  def model(self) -> tokenizer_lib.Tokenizer:
    """The tokenizer that stage 1 or 2 trains."""
    fields = self.config.model.to_dict()
    if self.tokenizer is not None:
      stored = self.tokenizer.config.to_dict()
      fields = tokenizer_stage.scaled_fields(self.config, stored)
    return tokenizer_lib.Tokenizer(
      image_size=sizes.canonical(self.config.data.image_size), **fields
    )

  def check(self) -> None:
    """Raises a UserError for what no training could use, data left aside."""
    config = ml_collections.ConfigDict(self.config, convert_dict=False)
    if config.model.attention in layers.PLATFORMS:
      # The machine that is asked here is not the one that trains.
      config = self.config.copy_and_resolve_references()
      config.model.attention = 'xla'
    checks.check(config)
    stage1 = self.tokenizer.config.to_dict() if self.tokenizer else None
    dry_run.abstract_task(config, stage1=stage1)


@dataclasses.dataclass(frozen=True)
class Plan:
  """The trainings of a row.

  Attributes:
    row: the row.
    tokenizer: stage 1.
    scaling: stage 2, None if the row has none.
    generator: None if the row has none.
  """

  row: ablations.Row
  tokenizer: Training
  scaling: Training | None = None
  generator: Training | None = None

  @property
  def trainings(self) -> list[Training]:
    """All of them, in an order in which they can run."""
    found = (self.tokenizer, self.scaling, self.generator)
    return [training for training in found if training is not None]

  @property
  def scored(self) -> Training:
    """The tokenizer that is scored, and decodes for the generator."""
    return self.scaling or self.tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is the same for all rows.

  Attributes:
    base: a key of `ablations.BASES`.
    changes: keys that the user changed, as `ablations.get_config` has them.
    budget: multiplies the steps of every training that `changes` leaves.
    more_data: the images of stage 2 in rows with `more_data`.
  """

  base: str
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  budget: float = 1.0
  more_data: str = ''

  def __post_init__(self) -> None:
    """Raises ConfigError for a base or a key that cannot be used."""
    errors.require_choice('--base', self.base, ablations.BASES)
    errors.require(
      0 < self.budget < float('inf'), '--budget', self.budget, 'above 0'
    )
    for key in self.changes:
      name = key.partition('.')[2] if _section(key) else key
      if name in RESERVED:
        raise errors.ConfigError(
          f'--config.{key} cannot be set for all rows; {RESERVED[name]}'
        )

  def of_stage(self, stage: str) -> dict[str, Any]:
    """The user's changes for a stage: of all stages, then of its own."""
    known = _values(f'{stage}:quickstart')
    everywhere = {k: v for k, v in self.changes.items() if k in known}
    prefix = f'{stage}.'
    own = {
      key.removeprefix(prefix): value
      for key, value in self.changes.items()
      if key.startswith(prefix)
    }
    return everywhere | own


def plan(row: ablations.Row, settings: Settings) -> Plan:
  """The trainings of a row.

  Raises:
    ConfigError: the row needs something that was not given.
  """
  base = ablations.BASES[settings.base]
  changes = dict(row.tokenizer)
  if row.decoder_like:
    changes |= _decoder_like(row, settings)
  stage1 = _train(settings, 'tokenizer', base.tokenizer, changes)
  if row.long_like:
    other = plan(ablations.find(row.long_like), settings)
    assert other.scaling is not None
    steps = sum(t.config.train.steps for t in (other.tokenizer, other.scaling))
    stage1 = with_changes(stage1, {'train.steps': steps})
  stage2 = generator = None
  if row.aligner:
    preset, size = base.aligners[row.aligner]
    changes = {**size, **row.scaling}
    if row.more_data:
      changes |= _more_data(row, settings)
    stage2 = _train(settings, 'scaling', preset, changes, stage1)
  if row.generator is not None:
    generator = _train(
      settings, 'generator', base.generator, row.generator, stage1
    )
  return Plan(row, stage1, stage2, generator)


def name_trainings(
  plans: Iterable[Plan], settings: Settings
) -> dict[Training, str]:
  """Folder names: that of the first row of all that needs the training.

  So a training has its name whichever rows are chosen.
  """
  wanted = {training for plan in plans for training in plan.trainings}
  named: dict[Training, str] = {}
  for row in ablations.ROWS:
    if len(named) == len(wanted):
      break
    chosen = next((p for p in plans if p.row == row), None)
    # Their trainings are like no other row's, and take long to find.
    if chosen is None and (row.decoder_like or row.more_data):
      continue
    for training in (chosen or plan(row, settings)).trainings:
      if training in wanted:
        name = f'{row.table}_{row.name}_{training.stage}'
        named.setdefault(training, name)
  return named


def count_parameters(model: tokenizer_lib.Tokenizer) -> int:
  """Counts the parameters of a tokenizer from their shapes."""
  image = jax.ShapeDtypeStruct(
    (1, *sizes.pair(model.image_size), 3), jnp.float32
  )
  return trees.count(jax.eval_shape(model.init, jax.random.key(0), image))


def match_decoder(
  model: tokenizer_lib.Tokenizer, wanted: int
) -> dict[str, Any]:
  """Finds a decoder that gives a tokenizer a number of parameters.

  Blocks are added first, up to twice as many as the model's decoder has, then
  the decoder is widened by a head at a time. The narrowest one counts that
  meets the number to 1 %.

  Args:
    model: the tokenizer; its own decoder is the smallest that is considered.
    wanted: parameters of the whole tokenizer.

  Returns:
    `model.decoder_width` and `model.decoder_depth`.

  Raises:
    ConfigError: no decoder of up to four times the width meets it.
  """

  def count(width: int, depth: int) -> int:
    return count_parameters(
      model.clone(decoder_width=width, decoder_depth=depth)
    )

  # Tables of 2D positions need multiples of 4.
  step = math.lcm(model.head_dim, 4)
  first, shallowest = model.decoder_width, model.decoder_depth
  for width in range(first, 4 * first + 1, step):
    # Blocks are alike: two counts give that of any depth.
    one, two = count(width, 1), count(width, 2)
    depth = 1 + round((wanted - one) / (two - one))
    miss = abs(one + (depth - 1) * (two - one) - wanted)
    if shallowest <= depth <= 2 * shallowest and miss <= TOLERANCE * wanted:
      return {'model.decoder_width': width, 'model.decoder_depth': depth}
  raise errors.ConfigError(
    f'no decoder of {shallowest} to {2 * shallowest} blocks brings this '
    f'tokenizer from {count_parameters(model):,} to {wanted:,} parameters, '
    f'give or take {TOLERANCE:.0%}'
  )


def _decoder_like(row: ablations.Row, settings: Settings) -> dict[str, Any]:
  """Width and depth of a decoder for a row `decoder_like` another."""
  other = plan(ablations.find(row.decoder_like), settings)
  own = _train(
    settings,
    'tokenizer',
    ablations.BASES[settings.base].tokenizer,
    row.tokenizer,
  )
  return match_decoder(own.model, count_parameters(other.scored.model))


def _more_data(row: ablations.Row, settings: Settings) -> dict[str, Any]:
  if not settings.more_data:
    raise errors.ConfigError(
      f'{row.path} needs more images than those of stage 1; give '
      '--more_data=PATH, or leave the row out'
    )
  # Its form is seen by itself; the images of stage 1 may be of another.
  return {'data.path': settings.more_data, 'data.source': 'auto'}


def _train(
  settings: Settings,
  stage: str,
  preset: str,
  changes: Mapping[str, Any],
  tokenizer: Training | None = None,
) -> Training:
  """A training with the user's changes, and after them the row's own."""
  fresh = Training(stage, preset, (), tokenizer)
  steps = _values(f'{stage}:{preset}')['train.steps']
  steps = max(1, round(settings.budget * steps))
  return with_changes(
    fresh, {'train.steps': steps, **settings.of_stage(stage), **changes}
  )


def check_changes(plans: Sequence[Plan], settings: Settings) -> None:
  """Raises ConfigError for a change of the user's that no row takes.

  What a row is about comes after the user's changes. A change that every row
  makes itself, or that is about a stage which none has, would do nothing.
  """
  taken = {
    (stage, key)
    for plan in plans
    for stage in plan.row.stages
    for key in set(settings.of_stage(stage)) - set(_own(plan, settings, stage))
  }
  for key in settings.changes:
    section, _, name = key.partition('.')
    if section == 'evaluate':
      continue
    stages: tuple[str, ...] = (section,)
    if section not in presets.STAGES:
      stages, name = presets.STAGES, key
    if not any((stage, name) in taken for stage in stages):
      raise errors.ConfigError(
        f'--config.{key}={settings.changes[key]} does nothing in '
        f'{", ".join(plan.row.path for plan in plans)}: they have no such '
        'training, or are about this key; leave it out'
      )


def _own(plan: Plan, settings: Settings, stage: str) -> ablations.Changes:
  """What a row changes itself in a stage."""
  row = plan.row
  if stage == 'generator':
    return row.generator or {}
  if stage == 'scaling':
    size = ablations.BASES[settings.base].aligners[row.aligner][1]
    return {**size, **row.scaling}
  steps = {'train.steps': 0} if row.long_like else {}
  return {**row.tokenizer, **steps}


def with_changes(training: Training, changes: Mapping[str, Any]) -> Training:
  """A training with other values; those that the preset has are left out."""
  plain = _values(f'{training.stage}:{training.preset}')
  changes = {**dict(training.changes), **changes}
  if unknown := sorted(set(changes) - set(plain)):
    raise errors.ConfigError(
      f'{training.stage}:{training.preset} has no {", ".join(unknown)}'
    )
  kept = sorted((k, v) for k, v in changes.items() if v != plain[k])
  return dataclasses.replace(training, changes=tuple(kept))


@functools.cache
def _values(preset: str) -> dict[str, Any]:
  """The values of a preset by key."""
  return trees.flatten(presets.get_config(preset).to_dict())


def _section(key: str) -> bool:
  """True for a key of one stage, or of the scoring."""
  return key.partition('.')[0] in (*presets.STAGES, 'evaluate')


def check(plans: Sequence[Plan]) -> None:
  """Raises a UserError, with the row's name, for the first misfit."""
  seen: set[Training] = set()
  for each in plans:
    for training in each.trainings:
      if training in seen:
        continue
      seen.add(training)
      try:
        training.check()
      except errors.UserError as error:
        raise errors.ConfigError(f'{each.row.path}: {error}') from error


def describe_changes(row: ablations.Row) -> list[str]:
  """What a row changes, each key as the stage's --config would take it."""
  changes = {
    'tokenizer': row.tokenizer,
    'scaling': row.scaling,
    'generator': row.generator or {},
  }
  found = [
    f'{stage}.{key}={value!r}'
    for stage, keys in changes.items()
    for key, value in keys.items()
  ]
  if row.decoder_like:
    found.append(f'a decoder that makes it as large as {row.decoder_like}')
  if row.long_like:
    found.append(f'as many steps as {row.long_like}')
  if row.more_data:
    found.append('stage 2 on --more_data')
  return found
