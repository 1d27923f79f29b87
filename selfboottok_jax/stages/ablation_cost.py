"""What rows of an ablation cost, and what sharing trainings saves.

The paper trains its generator once for five sizes of the local 2D aligner and
says that this takes 40 % of the cost away and 54 % of the time. `account`
computes the same for any presets.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selfboottok_jax import files, sizes
from selfboottok_jax.evaluation import cost, flops, markdown, tables
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.presets import ablations
from selfboottok_jax.stages import ablation, dry_run, programs
from selfboottok_jax.training import logging as logging_lib
from selfboottok_jax.training import sharding


@functools.cache
def forward_flops(model: tokenizer_lib.Tokenizer) -> float:
  """Operations of encoding and decoding one image, counted from a trace."""
  image = jax.ShapeDtypeStruct(
    (1, *sizes.pair(model.image_size), 3), jnp.float32
  )
  params = jax.eval_shape(model.init, jax.random.key(0), image)
  jaxpr = jax.make_jaxpr(model.apply)(params, image)
  return flops.count(jaxpr, [])[flops.OTHER].total


def measure(
  plan: ablation.Plan, runs: Mapping[ablation.Training, str | os.PathLike[str]]
) -> dict[str, tuple[float | int, str]]:
  """Cost of a row that was trained: (value, how) by metric.

  Args:
    plan: the row.
    runs: workdirs of its trainings.
  """
  model = plan.scored.model
  trained = seconds = 0.0
  for training, workdir in runs.items():
    config = training.config
    images = config.data.batch_size * config.train.steps
    trained += cost.read(workdir).flops.total * images
    seconds += logging_lib.seconds(files.as_path(workdir) / logging_lib.METRICS)
  return {
    'parameters': (
      ablation.count_parameters(model), 'of the tokenizer that is scored',
    ),
    'forward_gflops': (
      forward_flops(model) / 1e9, 'encoding and decoding an image',
    ),
    'train_pflops': (
      trained / 1e15, 'all trainings; each step as in its last phase',
    ),
    'train_seconds': (
      seconds, 'all trainings, one after the other, evaluations included',
    ),
  }  # fmt: skip


def saved_by_sharing(plans: Sequence[ablation.Plan]) -> list[str]:
  """Says how many trainings rows share; [] if they share none."""
  needed = [training for plan in plans for training in plan.trainings]
  if len(set(needed)) == len(needed):
    return []
  return [
    f'These rows need {len(needed)} trainings and share some: '
    f'{len(set(needed))} are run for each seed.'
  ]


@dataclasses.dataclass(frozen=True)
class Size:
  """A size of the local 2D aligner.

  Attributes:
    name: the paper's label.
    parameters: of the tokenizer with this aligner.
    forward: operations of encoding and decoding one image.
    whole: operations of a stage 1 that trains all of this tokenizer.
    stage2: operations of a stage 2 that trains the aligner alone.
  """

  name: str
  parameters: float | int
  forward: float | int
  whole: float | int
  stage2: float | int


@dataclasses.dataclass(frozen=True)
class Account:
  """What it costs to have tokenizers of several sizes, each with a generator.

  Attributes:
    base: the presets.
    sizes: the aligners.
    stage1: operations of the one stage 1 that all stages 2 start from.
    parameters: of the generator.
    forward: operations of one evaluation of the generator.
    generator: operations of its training.
  """

  base: str
  sizes: Sequence[Size]
  stage1: float | int
  parameters: float | int
  forward: float | int
  generator: float | int

  def lines(self) -> dict[str, tuple[float | int, float | int]]:
    """(a generator for each size, one for all) by what is compared.

    The first two count as the paper seems to: every tokenizer, and every
    generator that is trained. Of trainings the first number is a stage 1 and
    a generator for each size; they are in operations, which are time on devices
    of one speed. A chain is what cannot run at the same time.
    """
    sizes, count = self.sizes, len(self.sizes)
    parameters = sum(size.parameters for size in sizes)
    forward = sum(size.forward for size in sizes)
    whole = [size.whole + self.generator for size in sizes]
    stage2 = [size.stage2 for size in sizes]
    before, after = sum(whole), self.stage1 + sum(stage2) + self.generator
    longest = self.stage1 + max(*stage2, self.generator)
    return {
      'parameters': (
        parameters + count * self.parameters,
        parameters + self.parameters,
      ),
      'forward': (forward + count * self.forward, forward + self.forward),
      'training': (before, after),
      'chain': (max(whole), longest),
      'time': (before, longest),
    }


# The paper's numbers for five sizes: before, after, and their unit.
CLAIMS = {
  'parameters': ('4.9B', '2.95B', 1 - 2.95 / 4.9),
  'forward': ('60K GFLOPs', '36.6K GFLOPs', 1 - 36.6 / 60),
  'time': ('28 days', '13 days', 1 - 13 / 28),
}
_LABELS = {
  'parameters': 'parameters of all networks',
  'forward': 'FLOPs of a forward pass of each',
  'training': 'FLOPs of all trainings',
  'chain': 'FLOPs of the longest chain of trainings',
  'time': 'one after the other; then as many at a time as can',
}
_PREFIXES = ((1e18, 'E'), (1e15, 'P'), (1e12, 'T'), (1e9, 'G'), (1e6, 'M'))


def account(settings: ablation.Settings) -> Account:
  """Counts the cost of all sizes at a base; nothing is trained.

  Operations are those of the steps' last phase, from their traces.
  """
  mesh = sharding.make_mesh()
  plans = [
    ablation.plan(row, settings)
    for row in ablations.ROWS
    if row.table == 'figure6'
  ]
  sizes = []
  for made in plans:
    assert made.scaling is not None
    aligner = {
      f'model.{name}': getattr(made.scaling.model, name)
      for name in ('local2d_width', 'local2d_depth')
    }
    whole = ablation.with_changes(made.tokenizer, aligner)
    sizes.append(
      Size(
        made.row.name,
        ablation.count_parameters(made.scaling.model),
        forward_flops(made.scaling.model),
        _training(whole, mesh)[0],
        _training(made.scaling, mesh)[0],
      )
    )
  first = plans[0]
  assert first.generator is not None
  training, rows = _training(first.generator, mesh)
  own = [row for row in rows if row.trained]
  return Account(
    settings.base,
    sizes,
    _training(first.tokenizer, mesh)[0],
    sum(row.parameters for row in own),
    sum(row.flops.forward for row in own),
    training,
  )


def page(made: Account) -> str:
  """Describes an account as a section of Markdown."""
  count = len(made.sizes)
  lines = []
  for name, both in made.lines().items():
    claim = CLAIMS.get(name)
    lines.append(
      [
        _LABELS[name],
        *(_short(value, billions=name == 'parameters') for value in both),
        f'{1 - both[1] / both[0]:.1%}',
        f'{claim[0]} to {claim[1]}: {claim[2]:.1%}' if claim else 'not given',
      ]
    )
  sizes = [
    [
      size.name,
      f'{size.parameters:,}',
      *map(_short, (size.forward, size.whole, size.stage2)),
    ]
    for size in made.sizes
  ]
  generator = [
    'generator',
    f'{made.parameters:,}',
    *map(_short, (made.forward, made.generator)),
    '',
  ]
  return '\n\n'.join(
    [
      f'## {made.base}',
      markdown.table(
        [
          '',
          f'a generator for each of {count} sizes',
          'one generator',
          'saved',
          'the paper',
        ],
        lines,
      ),
      markdown.table(
        [
          'size',
          'parameters',
          'FLOPs forward',
          'FLOPs of training it whole',
          'of training the aligner alone',
        ],
        [*sizes, generator],
      ),
      f'Stage 1, from which every stage 2 starts: {_short(made.stage1)}FLOPs.'
      '\n',
    ]
  )


def _short(value: float | int, *, billions: bool = False) -> str:
  """A number with a decimal prefix, as 1.23 G, or 1.23 B where things count."""
  size, name = next((p for p in _PREFIXES if value >= p[0]), (1.0, ''))
  if billions and name == 'G':
    name = 'B'
  return f'{tables.number(float(value / size))} {name}'.rstrip()


def _training(
  training: ablation.Training, mesh: Mesh
) -> tuple[float, Sequence[cost.Row]]:
  """Operations of a training, and the parts of a step of its last phase."""
  config = training.config.copy_and_resolve_references()
  if 'adversarial_start' in config.loss:
    # The last phase from the start: one trace in place of two.
    config.loss.adversarial_start = 0.0
  first = training.tokenizer
  stage1 = None if first is None else first.config.to_dict()
  task = dry_run.abstract_task(config, stage1=stage1).task
  card = programs.TrainPrograms(config, task, mesh).card()
  images = config.data.batch_size * config.train.steps
  return card.flops.total * images, card.rows
