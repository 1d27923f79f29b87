"""What a training would need on hardware that is not there.

Memory, arithmetic, traffic between chips, the least time of a step and of the
whole training: from the program that XLA compiles for the hardware, or from its
partition where no compiler is at hand.
"""

import collections
import copy
import dataclasses
import json
import math
import re
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from selfboottok_jax import errors, placement
from selfboottok_jax.evaluation import (
  cost,
  flops,
  hlo,
  roofline,
  tables,
)
from selfboottok_jax.models import transformer
from selfboottok_jax.stages import checks, dry_run, programs, topology
from selfboottok_jax.training import sharding

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_NEEDED = re.compile(
  r'temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)'
)


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


class NoRoomError(Exception):
  """The compiler found no room for a program in a chip's memory.

  Attributes:
    bytes: what it wanted for intermediate values on one device; 0 if its words
      do not tell.
  """

  def __init__(self, words: str):
    """Takes the compiler's words."""
    super().__init__(words)
    found = _NEEDED.search(words)
    parts = [part for part in found.groups() if part] if found else ['0']
    unit = parts[1] if len(parts) > 1 else ''
    self.bytes = float(parts[0]) * _UNITS[unit]


def describe(
  config: ml_collections.ConfigDict,
  name: str,
  *,
  largest_batch: bool = True,
  json_only: bool = False,
) -> str:
  """The forecast as tables and a last line of JSON; see `forecast`."""
  found = forecast(config, name, largest_batch=largest_batch)
  line = json.dumps(found.to_dict())
  return line if json_only else f'{found.to_text()}\n{line}'


def forecast(
  config: ml_collections.ConfigDict, name: str, *, largest_batch: bool = True
) -> Forecast:
  """Foresees a training on hardware that need not be there.

  Args:
    config: of the training. What it does not name is assumed.
    name: of the hardware, as 'v5p:4x4x4' or 'h100:8'.
    largest_batch: whether to compile a second time, with another batch, to find
      the largest that fits.

  Raises:
    UserError: an unknown topology, a mesh or a batch that does not fit it, or
      no compiler for it.
  """
  where = topology.parse(name)
  topology.require_compiler(where)
  found = topology.call(where, _measure, config, where, largest_batch)
  if found.refused and not found.program.work:
    # Partitioned instead: what does not fit has collectives and work, too.
    emulated = dataclasses.replace(where, emulated=True)
    part = topology.call(emulated, _measure, config, emulated, False)
    memory = dataclasses.replace(
      part.program.memory, temporary=found.program.memory.temporary
    )
    program = dataclasses.replace(part.program, memory=memory)
    found = dataclasses.replace(found, program=program)
  return found


def _measure(
  config: ml_collections.ConfigDict, where: topology.Topology, twice: bool
) -> Forecast:
  """Traces and compiles, in a process that has the devices."""
  # Of TPUs that CPU devices stand for, kernels cannot be compiled either.
  is_tpu = where.chip.is_tpu and not where.emulated
  if where.emulated and config.model.attention == 'splash':
    config.model.attention = 'auto'
  with placement.assume_platform('tpu' if is_tpu else 'gpu'):
    return _measure_here(config, where, twice)


def _measure_here(
  config: ml_collections.ConfigDict, where: topology.Topology, twice: bool
) -> Forecast:
  mesh = sharding.make_mesh(**config.mesh, devices=where.devices())
  sharding.check_batch_size(config.data.batch_size, mesh)
  notes = []
  is_fused = not where.chip.is_tpu and (
    config.model.attention == 'cudnn'
    or (config.model.attention == 'auto' and config.model.dtype == 'bfloat16')
  )
  if is_fused:
    # Its kernels are traced on a GPU only.
    config.model.attention = 'xla'
    notes.append('attention of xla in place of cudnn, which keeps no weights')
  checks.check(config)
  abstract = dry_run.abstract_task(config)
  abstract.assumed.extend(notes)
  step_fn = programs.TrainPrograms(config, abstract.task, mesh)
  first = max(abstract.task.milestones)
  try:
    trace = _trace(config, abstract, step_fn, mesh, where.chip.tile)
  except ValueError as error:
    raise errors.ConfigError(
      f'this training cannot be foreseen: {error}'
    ) from error
  batch, refused = config.data.batch_size, ''
  try:
    program = _compile(step_fn, first, where, mesh, batch)
  except NoRoomError as error:
    refused = str(error).splitlines()[0]
    memory = _memory(step_fn, where, error.bytes * where.chip.devices)
    program = Program(batch, memory, [], [], math.nan)
  other = None
  smaller = batch // 2
  if refused:
    room = where.chip.usable - program.memory.fixed
    smaller = int(room / max(program.memory.per_image(batch), 1))
    smaller = min(smaller, batch // 2) // mesh.size * mesh.size
    twice = twice and smaller > 0
  elif smaller % mesh.size:
    smaller = 2 * batch
  if twice:
    config.data.batch_size = smaller
    again = programs.TrainPrograms(config, abstract.task, mesh)
    try:
      other = _compile(again, first, where, mesh, smaller)
      # Its work would only make the answer large.
      other = dataclasses.replace(other, work=[], moved=[])
    except NoRoomError:
      pass
  config.data.batch_size = batch
  return Forecast(
    where=where,
    kept=_kept(config, step_fn, mesh, first),
    remat=transformer.remat_of(config.model.remat),
    batch_size=batch,
    steps=config.train.steps,
    trace=trace,
    program=program,
    other=other,
    compiled=not where.emulated and not refused,
    refused=refused,
  )


def _trace(
  config: ml_collections.ConfigDict,
  abstract: dry_run.AbstractTask,
  step_fn: programs.TrainPrograms,
  mesh: Mesh,
  tile: int,
) -> Trace:
  task, batch = abstract.task, config.data.batch_size
  components = task.components(step_fn.state.params)
  by_phase = {
    first: cost.count(step_fn.jaxpr(first), components, batch)
    for first in sorted(task.milestones)
  }
  totals = {
    first: sum(row.flops.total for row in rows)
    for first, rows in by_phase.items()
  }
  last = max(totals)
  params, trained = step_fn.state.params, step_fn.state.opt
  names = [component.name for component in components]
  padded = {}
  if tile:
    padded = flops.count_padded(step_fn.jaxpr(last), names, tile)
  return Trace(
    rows=by_phase[last],
    types=flops.count_types(step_fn.jaxpr(last), names),
    padded=padded,
    phases={first: total / totals[last] for first, total in totals.items()},
    assumed=abstract.assumed,
    mesh=dict(mesh.shape),
    least_moved=roofline.least_moved(
      {group: params[group] for group in trained},
      [step_fn.frozen, *(p for g, p in params.items() if g not in trained)],
      size=4 if config.model.dtype == 'float32' else 2,
      devices=mesh.size,
    ),
  )


def _kept(
  config: ml_collections.ConfigDict,
  step_fn: programs.TrainPrograms,
  mesh: Mesh,
  first: int,
) -> dict[str, float]:
  """Bytes that a chip keeps between the passes, by key of REMATS."""
  kept = {}
  for remat in transformer.REMATS:
    other = copy.deepcopy(config)
    other.model.remat = remat
    task = dry_run.abstract_task(other).task
    by_device = programs.kept_bytes(task, step_fn, mesh, first)
    kept[remat] = by_device / config.train.accumulate
  return kept


def _compile(
  step_fn: programs.TrainPrograms,
  first: int,
  where: topology.Topology,
  mesh: Mesh,
  batch: int,
) -> Program:
  """Compiles the phase that begins at step `first`.

  Raises:
    NoRoomError: it does not fit the chip.
  """
  try:
    with topology.partitioned() as texts:
      compiled = step_fn.compile(first)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise NoRoomError(str(error)) from error
  stats = compiled.memory_analysis()
  padding = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
  )
  memory = _memory(
    step_fn,
    where,
    stats.temp_size_in_bytes * where.chip.devices,
    0 if where.emulated else stats.generated_code_size_in_bytes,
    0 if where.emulated else padding,
  )
  seconds = step_fn.compile_seconds[first] or math.nan
  if not where.emulated:
    program = hlo.Program(compiled.as_text())
    work = roofline.compiled_work(program)
    return Program(
      batch, memory, work, program.collectives(dict(mesh.shape)), seconds
    )
  text = texts[-1] if texts else step_fn.unoptimized(first)
  program = hlo.Program(text)
  # The update reads and writes the whole state once.
  held = 2 * memory.state / where.chip.devices
  work = [
    *roofline.traced_work(program),
    roofline.Work('update of the state', {}, held),
  ]
  moved = program.collectives(dict(mesh.shape), scatter=True)
  return Program(batch, memory, work, moved, seconds)


def _memory(
  step_fn: programs.TrainPrograms,
  where: topology.Topology,
  temporary: float | int,
  program: float | int = 0,
  held: float | int = 0,
) -> Memory:
  """The memory of a chip; `held` are inputs and outputs as they lie in it."""
  devices = where.chip.devices
  state, frozen, batch = (
    devices * cost.shard_bytes(tree)
    for tree in (step_fn.state, step_fn.frozen, step_fn.batch)
  )
  padding = max(0, devices * held - state - frozen - batch)
  return Memory(state, frozen, batch, temporary, devices * program, padding)


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
