"""The forecast of a training on hardware: numbers, JSON and text.

`foresee` makes it.
"""

import collections
import dataclasses
import math
from typing import Any

from selfboottok_jax.evaluation import cost, flops, hlo, roofline, tables
from selfboottok_jax.stages import topology


@dataclasses.dataclass(frozen=True)
class Memory:
  """Memory that a step needs on each chip, in bytes.

  Attributes:
    state: parameters, running means, moments of the optimiser.
    frozen: parameters of frozen networks.
    batch: images or codes, and labels.
    temporary: intermediate values, at their largest.
    program: the instructions, where they are kept in the same memory.
    padding: what the layout of the hardware adds to inputs and outputs.
  """

  state: float | int
  frozen: float | int
  batch: float | int
  temporary: float | int
  program: float | int = 0
  padding: float | int = 0

  @property
  def total(self) -> float | int:
    """Sum of all parts."""
    return sum(dataclasses.astuple(self))

  @property
  def fixed(self) -> float | int:
    """Part that does not depend on the batch."""
    return self.state + self.frozen + self.program

  def per_image(self, batch_size: int) -> float:
    """Part that grows with the batch, for one image of it."""
    return (self.total - self.fixed) / batch_size


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled or partitioned train step.

  Attributes:
    batch_size: images in its global batch.
    memory: need of a chip.
    work: what one device does.
    moved: what one device receives from others.
    compile_seconds: seconds of its compilation.
  """

  batch_size: int
  memory: Memory
  work: list[roofline.Work]
  moved: list[hlo.Collective]
  compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Trace:
  """Facts of a traced train step that hold on any hardware.

  Attributes:
    rows: the last phase by component; operations are per image.
    types: operations of a step of the last phase, by component and type.
    phases: for each phase its first step, and the operations of its step over
      those of the last phase.
    assumed: a line for everything that was supposed because it was not given.
    mesh: sizes of the mesh.
    least_moved: bytes that each device must receive in a step, see
      `roofline.least_moved`.
    padded: operations of a step of the last phase by component, in whole tiles
      of the chip, see `flops.count_padded`; {} for chips without.
  """

  rows: list[cost.Row]
  types: dict[str, dict[str, float]]
  phases: dict[int, float]
  assumed: list[str]
  mesh: dict[str, int]
  least_moved: float | int
  padded: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Forecast:
  """Needs of a training on hardware that a topology names.

  Attributes:
    where: the hardware.
    batch_size: images in the global batch.
    steps: updates of the whole training.
    trace: what the hardware does not change.
    program: the train step, with every loss on.
    other: the same with another batch, to foresee the need of larger ones; None
      if that was not asked for, or did not compile.
    compiled: True if XLA compiled the program for the hardware; False if it was
      only partitioned for as many devices.
    refused: the compiler's words if the program does not fit the memory.
    kept: bytes that a chip keeps from the forward to the backward pass, by what
      may be computed again, a key of `transformer.REMATS`.
    remat: the key that the program has.
  """

  where: topology.Topology
  batch_size: int
  steps: int
  trace: Trace
  program: Program
  other: Program | None
  compiled: bool
  refused: str = ''
  kept: dict[str, float] = dataclasses.field(default_factory=dict)
  remat: str = ''

  @property
  def roofline(self) -> roofline.Roofline:
    """The least seconds of a step."""
    return roofline.estimate(
      self.program.work, self.program.moved, self.where.chip, self.trace.mesh
    )

  @property
  def flops(self) -> flops.Flops:
    """Operations of a step on all chips together."""
    total = sum((row.flops for row in self.trace.rows), flops.Flops())
    return total * self.batch_size

  @property
  def mfu_bound(self) -> float:
    """The model's operations over those of the peak in the least time."""
    peak = self.where.chip.peak * self.where.size
    return self.flops.model / (peak * self.roofline.seconds)

  @property
  def hours(self) -> float:
    """Hours of the whole training, if every step takes the least time.

    Phases with fewer losses are taken to be faster as they compute less.
    """
    ends = [*list(self.trace.phases)[1:], self.steps]
    share = sum(
      max(0, min(end, self.steps) - first) * part
      for (first, part), end in zip(
        self.trace.phases.items(), ends, strict=True
      )
    )
    return share * self.roofline.seconds / 3600

  @property
  def fits(self) -> bool:
    """True if a chip has room for the step."""
    return not self.refused and (
      self.program.memory.total <= self.where.chip.usable
    )

  @property
  def largest_batch(self) -> int | None:
    """The largest global batch that fits; 0 if none does, None if unknown.

    Memory is a line through two programs. Where one was refused, all
    intermediate values of the other are taken to grow with the batch.
    """
    one, two, room = self.program, self.other, self.where.chip.usable
    if self.refused:
      # Refused programs say more than they would need: the compiler gives up
      # before it saves memory.
      one, two = two or one, None
    elif two is None:
      return None
    if two is None:
      fixed, slope = one.memory.fixed, one.memory.per_image(one.batch_size)
    else:
      slope = (one.memory.total - two.memory.total) / (
        one.batch_size - two.batch_size
      )
      fixed = one.memory.total - slope * one.batch_size
    if slope <= 0:
      return None
    devices = self.where.num_devices
    return max(0, int((room - fixed) / slope) // devices * devices)

  @property
  def needs(self) -> dict[str, float]:
    """Memory of a chip, in bytes, by what the backward pass computes again.

    That of the program, with what it keeps exchanged for what others would.
    """
    if not self.kept or (self.refused and not self.program.memory.temporary):
      return {}
    rest = self.program.memory.total - self.kept[self.remat]
    return {remat: rest + kept for remat, kept in self.kept.items()}

  @property
  def proposed_remat(self) -> str:
    """The key of `needs` that computes least again and fits; '' if none."""
    fitting = [
      remat
      for remat, need in self.needs.items()
      if need <= self.where.chip.usable
      # What the compiler refused does not fit, whatever the sum says.
      and not (self.refused and remat == self.remat)
    ]
    return fitting[0] if fitting else ''

  def filled(self, row: cost.Row) -> float | None:
    """Share of a row's operations in whole tiles that are of its numbers.

    The rest multiplies padding. None for chips without tiles, or for no
    products.
    """
    whole = self.trace.padded.get(_other(row), 0.0)
    return row.flops.total * self.batch_size / whole if whole else None

  @property
  def received(self) -> float | int:
    """Bytes that each chip receives in a step."""
    devices = self.where.chip.devices
    return devices * sum(moved.bytes for moved in self.program.moved)

  def to_dict(self) -> dict[str, Any]:
    """All numbers, for JSON. Bytes are those of a chip, operations of all."""
    bound, chip, by_chip = self.roofline, self.where.chip, self.where.size
    executed = collections.Counter[str]()
    for one in self.program.work:
      executed.update(one.flops)
    return {
      'topology': self.where.name,
      'chips': by_chip,
      'mesh': self.trace.mesh,
      'batch_size': self.batch_size,
      'compiled': self.compiled,
      'fits': self.fits,
      'bytes_per_chip': round(self.program.memory.total),
      'chip_bytes': round(chip.memory),
      'usable_bytes': round(chip.usable),
      'memory': dataclasses.asdict(self.program.memory),
      'largest_batch': self.largest_batch,
      'remat': self.remat,
      'bytes_by_remat': {k: round(n) for k, n in self.needs.items()},
      'proposed_remat': self.proposed_remat,
      'flops_per_step': self.flops.total,
      'model_flops_per_step': self.flops.model,
      'recomputed_flops_per_step': self.flops.recompute,
      'flops_per_chip': {
        kind: n * chip.devices for kind, n in executed.items()
      },
      'components': [
        {
          'component': row.component,
          'parameters': row.parameters,
          'trained': row.trained,
          **dataclasses.asdict(row.flops * self.batch_size),
          'types': self.trace.types[_other(row)],
          'tiles_filled': self.filled(row),
        }
        for row in self.trace.rows
      ],
      'collective_bytes': round(self.received),
      'least_collective_bytes': round(self.trace.least_moved * chip.devices),
      'collectives': [
        dataclasses.asdict(moved)
        | {
          'bytes': round(moved.bytes * chip.devices),
          'seconds': roofline.link_seconds(moved, chip, self.trace.mesh),
        }
        for moved in self.program.moved
      ],
      'roofline_seconds': bound.seconds,
      'roofline': dataclasses.asdict(bound),
      'bound_by': bound.bound_by,
      'mfu_bound': self.mfu_bound,
      'steps': self.steps,
      'hours': self.hours,
      'chip_hours': self.hours * by_chip,
      'compile_seconds': _or_none(self.program.compile_seconds),
      'assumed': self.trace.assumed,
    }

  def to_text(self) -> str:
    """Tables and sentences for people."""
    mesh = ' x '.join(f'{k} {v}' for k, v in self.trace.mesh.items())
    return '\n'.join(
      [
        f'{self.where.size} x {self.where.chip.name} ({self.where.name}, mesh: '
        f'{mesh}), batch {self.batch_size:,}',
        *(f'assumed: {line}' for line in self.trace.assumed),
        '',
        _flops_table(self),
        '',
        *_memory_lines(self),
        '',
        *_link_lines(self),
        '',
        *_time_lines(self),
      ]
    )


def _other(row: cost.Row) -> str:
  """The name of a row in the count by type."""
  return flops.OTHER if row.trained is None else row.component


def _or_none(seconds: float) -> float | None:
  """JSON has no NaN."""
  return None if math.isnan(seconds) else seconds


def _flops_table(found: Forecast) -> str:
  """Operations per image: by component, phase and type."""
  kinds = sorted({kind for row in found.trace.types.values() for kind in row})
  columns = ['component', 'parameters', 'kind', 'forward', 'backward',
             'recompute', *kinds]  # fmt: skip
  has_tiles = bool(found.trace.padded)
  rows: list[dict[str, Any]] = []
  for row in found.trace.rows:
    types = found.trace.types[_other(row)]
    rows.append(
      {
        'component': row.component,
        'parameters': row.parameters,
        'kind': cost.kind(row),
      }  # fmt: skip
      | {k: v / 1e9 for k, v in dataclasses.asdict(row.flops).items()}
      | {k: types.get(k, 0) / found.batch_size / 1e9 for k in kinds}
    )
    filled = found.filled(row)
    if filled is not None:
      rows[-1]['tiles filled'] = f'{filled:.0%}'
  rows.append(
    {'component': 'total', 'kind': ''}
    | {
      key: sum(row[key] for row in rows)
      for key in columns
      if key not in ('component', 'kind')
    }
  )
  lines = [
    'GFLOPs per image of a train step, matrix products and convolutions, by '
    'pass and by type'
  ]
  if has_tiles:
    whole = sum(found.trace.padded.values())
    total = found.flops.total / whole if whole else 1.0
    rows[-1]['tiles filled'] = f'{total:.0%}'
    columns.append('tiles filled')
    lines.append(
      f'tiles filled: share that is not padding, in tiles of '
      f'{found.where.chip.tile}'
    )
  return '\n'.join([tables.table(rows, columns), *lines])


def _memory_lines(found: Forecast) -> list[str]:
  memory, chip = found.program.memory, found.where.chip
  parts = ', '.join(
    f'{name} {tables.size(round(value))}'
    for name, value in dataclasses.asdict(memory).items()
    if value
  )
  lines = [
    f'memory per chip: {tables.size(round(memory.total))} of '
    f'{tables.size(round(chip.memory))}, of which a program can have '
    f'{tables.size(round(chip.usable))} ({parts})'
  ]
  if found.refused:
    lines.append(f'DOES NOT FIT; the compiler says: {found.refused}')
  elif not found.fits:
    lines.append('DOES NOT FIT')
  if found.needs:
    needs = ', '.join(
      f'{remat} {tables.size(round(need))}'
      for remat, need in found.needs.items()
    )
    proposed = found.proposed_remat
    advice = f'{proposed} computes least again and fits: --config.model.remat='
    if not proposed:
      advice = 'none of them fits'
    elif proposed == found.remat:
      advice = f'{proposed}, as it is, computes least again and fits'
    else:
      advice += proposed
    lines.append(f'by model.remat, about: {needs}; {advice}')
  if found.where.emulated:
    lines.append(
      'temporary: as compiled for CPU devices, which compute 16-bit numbers in '
      '32 bits and fuse less; the hardware needs less'
    )
  largest = found.largest_batch
  if largest is not None and found.other is not None and not found.refused:
    lines.append(
      f'largest global batch that fits: {largest:,}, on a line through the '
      f'programs of batch {found.batch_size:,} and {found.other.batch_size:,}'
    )
  elif largest is not None:
    lines.append(
      f'largest global batch that fits: about {largest:,}, if intermediate '
      f'values grow in proportion from batch '
      f'{(found.other or found.program).batch_size:,}'
    )
  return lines


def _link_lines(found: Forecast) -> list[str]:
  chip, devices = found.where.chip, found.where.chip.devices
  if not found.program.moved:
    return ['collectives: none']
  rows = [
    {
      'collective': moved.kind,
      'axes': ' x '.join(moved.axes),
      'count': moved.count,
      'MB': moved.bytes * devices / 1e6,
      'ms': 1e3 * roofline.link_seconds(moved, chip, found.trace.mesh),
    }
    for moved in found.program.moved
  ]
  rows.append(
    {
      'collective': 'total',
      'axes': '',
      'count': sum(moved.count for moved in found.program.moved),
      'MB': found.received / 1e6,
      'ms': 1e3 * found.roofline.links,
    }
  )
  least = found.trace.least_moved * devices
  lines = [
    tables.table(rows, ('collective', 'axes', 'count', 'MB', 'ms')),
    'received by each chip in a step, loops counted as often as they run, as '
    + ('compiled' if found.compiled else 'partitioned for as many devices'),
  ]
  if least:
    lines.append(
      f'that is {found.received / least:.2f} times the least, '
      f'{least / 1e6:,.0f} MB: weights gathered forward and backward, '
      'gradients scattered or summed'
    )
  return lines


def _time_lines(found: Forecast) -> list[str]:
  bound, size = found.roofline, found.where.size
  source = (
    'the program compiled for the chip'
    if found.compiled
    else 'the products of the partitioned program, all else taken to be fused'
  )
  frozen = sum(
    row.flops.model for row in found.trace.rows if row.trained is False
  )
  share = frozen * found.batch_size / found.flops.model
  return [
    f'roofline: {1e3 * bound.seconds:.4g} ms a step, bound by '
    f'{bound.bound_by}: products {1e3 * bound.arithmetic:.4g} ms, then memory '
    f'{1e3 * bound.memory:.4g} ms; beside them links '
    f'{1e3 * bound.links:.4g} ms, all traffic {1e3 * bound.fetches:.4g} ms; '
    f'from {source}',
    f'MFU bound: {found.mfu_bound:.1%} of {found.where.chip.peak / 1e12:,.0f} '
    f'TFLOP/s, dense bfloat16; frozen networks are {share:.0%} of it',
    f'training: {found.steps:,} steps in {found.hours:,.1f} h, '
    f'{found.hours * size:,.0f} chip-hours at that bound',
    f'compile time: {tables.duration(found.program.compile_seconds)}',
  ]
