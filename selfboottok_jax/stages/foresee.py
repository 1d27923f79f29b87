"""Foresees a training on hardware that is not there.

Memory, arithmetic, traffic between chips and the least time of a step: from the
program that XLA compiles for the hardware, or from its partition where no
compiler is at hand.
"""

import copy
import dataclasses
import json
import math
import re

import jax
import ml_collections
from jax.sharding import Mesh

from selfboottok_jax import errors, placement
from selfboottok_jax.evaluation import cost, flops, hlo, roofline
from selfboottok_jax.models import transformer
from selfboottok_jax.stages import (
  checks,
  dry_run,
  forecast,
  programs,
  topology,
)
from selfboottok_jax.training import sharding

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
_NEEDED = re.compile(
  r'temporaries \(([\d.]+)([KMGT]?)\)|Used ([\d.]+)([KMGT]?)'
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
  """The forecast as tables and a last line of JSON; see `foresee`."""
  found = foresee(config, name, largest_batch=largest_batch)
  line = json.dumps(found.to_dict())
  return line if json_only else f'{found.to_text()}\n{line}'


def foresee(
  config: ml_collections.ConfigDict, name: str, *, largest_batch: bool = True
) -> forecast.Forecast:
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
) -> forecast.Forecast:
  """Traces and compiles, in a process that has the devices."""
  # CPU devices that stand for TPUs cannot compile the kernels of TPUs.
  is_tpu = where.chip.is_tpu and not where.emulated
  if where.emulated and config.model.attention == 'splash':
    config.model.attention = 'auto'
  with placement.assume_platform('tpu' if is_tpu else 'gpu'):
    return _measure_here(config, where, twice)


def _measure_here(
  config: ml_collections.ConfigDict, where: topology.Topology, twice: bool
) -> forecast.Forecast:
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
    program = forecast.Program(batch, memory, [], [], math.nan)
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
  return forecast.Forecast(
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
) -> forecast.Trace:
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
  return forecast.Trace(
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
) -> forecast.Program:
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
    return forecast.Program(
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
  return forecast.Program(batch, memory, work, moved, seconds)


def _memory(
  step_fn: programs.TrainPrograms,
  where: topology.Topology,
  temporary: float | int,
  program: float | int = 0,
  held: float | int = 0,
) -> forecast.Memory:
  """The memory of a chip; `held` are inputs and outputs as they lie in it."""
  devices = where.chip.devices
  state, frozen, batch = (
    devices * cost.shard_bytes(tree)
    for tree in (step_fn.state, step_fn.frozen, step_fn.batch)
  )
  padding = max(0, devices * held - state - frozen - batch)
  return forecast.Memory(
    state, frozen, batch, temporary, devices * program, padding
  )
