"""The cost card of a training: parameters, operations, memory, compile time."""

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend import core
from jaxtyping import PyTree

from selfboottok_jax import errors, files, trees
from selfboottok_jax.evaluation import flops, hardware, tables

FILE = 'cost.json'

# Dense bfloat16 operations per second and device, by `device_kind`.
PEAKS = {
  kind: chip.peak / chip.devices
  for chip in hardware.CHIPS.values()
  for kind in chip.kinds
}
_COLUMNS = (
  'component', 'parameters', 'kind', 'forward', 'backward', 'recompute',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Component:
  """A network, or a module of one, whose cost has a row of its own.

  Attributes:
    name: unique within a training; the named scope in which it computes.
    params: its parameters, or their shapes.
    trained: True if the training updates them.
  """

  name: str
  params: PyTree
  trained: bool


@dataclasses.dataclass(frozen=True)
class Row:
  """The cost of a component of a training.

  Attributes:
    component: its name.
    parameters: number of its parameters.
    trained: True if the training updates them; None for the losses, which
      have no parameters.
    flops: operations per image of a train step.
  """

  component: str
  parameters: int
  trained: bool | None
  flops: flops.Flops


@dataclasses.dataclass(frozen=True)
class Memory:
  """Memory of a compiled train step on each device, in bytes.

  Attributes:
    state: parameters, running means and moments of the optimiser.
    frozen: parameters of frozen networks.
    batch: images and labels.
    temporary: intermediate values, at their largest.
  """

  state: int
  frozen: int
  batch: int
  temporary: int

  @property
  def total(self) -> int:
    """Sums the parts; by donation the new state replaces the old one."""
    return self.state + self.frozen + self.batch + self.temporary


@dataclasses.dataclass(frozen=True)
class Card:
  """The cost of one phase of a training, known before it runs.

  Attributes:
    rows: the components, then everything that belongs to none.
    first_step: first step of the phase.
    memory: need of the step compiled for `devices`; None before it is compiled.
    compile_seconds: None before the step is compiled, and if it was read back
      from the compilation cache.
    devices: number, kind and mesh of the devices.
  """

  rows: Sequence[Row]
  first_step: int = 0
  memory: Memory | None = None
  compile_seconds: float | None = None
  devices: str = ''

  @property
  def flops(self) -> flops.Flops:
    """Sums the operations per image over all rows."""
    return sum((row.flops for row in self.rows), flops.Flops())

  def parameters(self, *, trained: bool) -> int:
    """Counts the trained or the frozen parameters."""
    return sum(r.parameters for r in self.rows if r.trained is trained)

  def to_dict(self) -> dict[str, Any]:
    """Converts the card into nested dicts and lists, for JSON."""
    return dataclasses.asdict(self)


def complete(card: Card, other: Card) -> Card:
  """Fills gaps of a card from an earlier card of the same program.

  A continued training may not know memory or compile time: it reads its program
  back from the compilation cache. `card` is returned as it is if `other`
  describes another program.
  """
  if (card.rows, card.first_step) != (other.rows, other.first_step):
    return card
  if card.memory is None:
    return other
  if card.devices != other.devices or card.compile_seconds is not None:
    return card
  return dataclasses.replace(card, compile_seconds=other.compile_seconds)


def write(card: Card, workdir: str | os.PathLike[str]) -> None:
  """Writes the card of a training into its workdir."""
  text = json.dumps(card.to_dict(), indent=2) + '\n'
  files.write_atomically(files.as_path(workdir) / FILE, text.encode())


def read(workdir: str | os.PathLike[str]) -> Card:
  """Reads the card that `write` wrote.

  Raises:
    UserError: there is none, or it is damaged.
  """
  path = files.as_path(workdir) / FILE
  try:
    with files.reaching(path):
      values = json.loads(path.read_bytes())
    rows = [
      Row(**{**row, 'flops': flops.Flops(**row['flops'])})
      for row in values['rows']
    ]
    memory = values['memory'] and Memory(**values['memory'])
    return Card(**{**values, 'rows': rows, 'memory': memory})
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise errors.UserError(
      f'{path} cannot be read ({error}); give the --workdir of a training, and '
      'continue that training to write it anew'
    ) from error


def count(
  jaxpr: core.ClosedJaxpr,
  components: Sequence[Component],
  batch_size: int,
) -> list[Row]:
  """Counts the rows of a train step from its trace.

  Args:
    jaxpr: the trace of the step.
    components: networks that have a row of their own.
    batch_size: images in the batch that was traced.

  Returns:
    A row for each component, and one for the losses: all the rest.
  """
  counted = flops.count(jaxpr, [component.name for component in components])
  per_image = {name: f * (1 / batch_size) for name, f in counted.items()}
  rows = []
  for component in components:
    name, size = component.name, trees.count(component.params)
    rows.append(Row(name, size, component.trained, per_image[name]))
  return [*rows, Row('losses', 0, None, per_image[flops.OTHER])]


def measure_memory(
  compiled: Any, state: PyTree, frozen: PyTree, batch: PyTree
) -> Memory:
  """Measures a compiled step and its inputs, which may be abstract."""
  return Memory(
    state=shard_bytes(state),
    frozen=shard_bytes(frozen),
    batch=shard_bytes(batch),
    temporary=compiled.memory_analysis().temp_size_in_bytes,
  )


def shard_bytes(tree: PyTree) -> int:
  """Counts the bytes of a placed tree on one device."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    # Works for shapes too: abstract leaves have a sharding and no data.
    shard = leaf.sharding.shard_shape(leaf.shape)
    total += leaf.dtype.itemsize * math.prod(shard)
  return total


def peak_flops(device_kind: str) -> float | None:
  """Looks up a device's dense bfloat16 FLOP/s; None if unknown."""
  return PEAKS.get(device_kind)


def table(card: Card) -> str:
  """Formats a card as plain text."""
  rows = [
    {
      'component': row.component,
      'parameters': row.parameters,
      'kind': kind(row),
      **_gigas(row.flops),
    }
    for row in card.rows
  ]
  rows.append(
    {
      'component': 'total',
      'parameters': sum(row.parameters for row in card.rows),
      'kind': '',
      **_gigas(card.flops),
    }
  )
  lines = [
    tables.table(rows, _COLUMNS),
    f'parameters: {card.parameters(trained=True):,} trained, '
    f'{card.parameters(trained=False):,} frozen',
    'forward, backward, recompute: GFLOPs per image of a train step, matrix '
    'products and convolutions, a multiply-add as two',
    *sentences(card),
  ]
  return '\n'.join(lines)


def sentences(card: Card) -> list[str]:
  """Describes memory and compile time; [] before the step is compiled."""
  if card.memory is None:
    return []
  memory = {
    name: getattr(card.memory, name)
    for name in ('state', 'frozen', 'batch', 'temporary')
  }
  parts = ', '.join(f'{k} {tables.size(v)}' for k, v in memory.items())
  known = [
    f'memory per device: {tables.size(card.memory.total)} ({parts}), as '
    f'compiled for {card.devices}'
  ]
  if card.compile_seconds is not None:
    known.append(f'compile time: {tables.duration(card.compile_seconds)}')
  return known


def kind(row: Row) -> str:
  """Names the kind of a row: 'trained', 'frozen', or '' for the losses."""
  return {True: 'trained', False: 'frozen', None: ''}[row.trained]


def _gigas(counted: flops.Flops) -> dict[str, float]:
  return {k: v / 1e9 for k, v in dataclasses.asdict(counted).items()}
