"""The least time that a chip needs for a program: arithmetic, memory, links.

An instruction takes as long as its products at the chip's peak, or as the bytes
that it reads and writes in main memory, whichever is more. Instructions follow
each other; what moves between chips or is fetched ahead flows beside them. No
program is faster. Latencies, idle units and imperfect overlap make it slower.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from selfboottok_jax.evaluation import flops, hardware, hlo

# Instructions that name, group or await values and move nothing.
_FREE = frozenset(
  (
    *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'),
    *('after-all', 'partition-id', 'replica-id', 'opt-barrier', 'domain'),
    *('while', 'call', 'conditional', 'async-start', 'async-update'),
    *('async-done', 'add-dependency', 'reshape'),
  )
)
# Custom calls that only reserve memory or synchronise.
_MARKS = ('AllocateBuffer', 'AsyncCollectiveStart', 'AsyncCollectiveDone')
# Reads of parts of their first operand.
_PARTIAL = ('dynamic-slice', 'slice', 'gather')
_SHORT = {
  'bf16': 'bfloat16', 'f16': 'float16', 'f32': 'float32', 'f64': 'float64',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Work:
  """Arithmetic and memory traffic of an instruction on one device, per step.

  Attributes:
    scope: where it was traced.
    flops: operations of its products, by type.
    bytes: bytes that it reads and writes in main memory.
    times: how often it runs; the other numbers are sums over all of them.
    ahead: True if it fetches what a later instruction reads, beside others.
  """

  scope: str
  flops: Mapping[str, float | int]
  bytes: float | int
  times: int = 1
  ahead: bool = False


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Least seconds of a step on every chip.

  Attributes:
    arithmetic: products of instructions that are bound by arithmetic.
    memory: traffic of instructions that are bound by memory.
    links: traffic between chips, over whatever is the slowest way.
    fetches: the traffic of all instructions, and of what is fetched ahead.
  """

  arithmetic: float | int
  memory: float | int
  links: float | int
  fetches: float | int

  @property
  def seconds(self) -> float | int:
    """The least time of a step."""
    return max(self.arithmetic + self.memory, self.links, self.fetches)

  @property
  def bound_by(self) -> str:
    """Names the longest part: 'arithmetic', 'memory' or 'links'."""
    if self.links >= self.seconds:
      return 'links'
    if self.fetches >= self.seconds or self.memory > self.arithmetic:
      return 'memory'
    return 'arithmetic'


def compiled_work(program: hlo.Program) -> list[Work]:
  """The work of every instruction of an optimised program.

  Buffers that the compiler keeps in a core's own memory cost no traffic.

  Raises:
    ValueError: a product stands in a loop of unknown length.
  """
  work = []
  for step in program.steps():
    counted = _products(program, step)
    moved = _traffic(program, step)
    if step.times is None and counted:
      raise ValueError(
        f'a loop of unknown length multiplies matrices in '
        f'{step.instruction.scope}; wanted a scan, or a fori_loop of static '
        'length'
      )
    # A loop of unknown length that moves little counts once.
    times = 1 if step.times is None else step.times
    if counted or moved:
      ahead = step.instruction.opcode in ('copy-start', 'slice-start')
      work.append(
        Work(
          step.instruction.scope,
          {kind: times * n for kind, n in counted.items()},
          times * moved,
          times,
          ahead,
        )
      )
  return work


def traced_work(program: hlo.Program) -> list[Work]:
  """The work of the products of a program that nothing has fused yet.

  A product reads its factors and writes its result; all else is taken to
  happen in passing, as in a perfect kernel.

  Raises:
    ValueError: a product stands in a loop of unknown length.
  """
  work = []
  for step in program.steps():
    counted = _products(program, step)
    if not counted:
      continue
    if step.times is None:
      raise ValueError(
        f'a loop of unknown length multiplies matrices in '
        f'{step.instruction.scope}; wanted a scan, or a fori_loop of static '
        'length'
      )
    shapes = [*step.instruction.shapes[:1]]
    shapes += [operand.shapes[0] for operand in step.operands]
    work.append(
      Work(
        step.instruction.scope,
        {kind: step.times * n for kind, n in counted.items()},
        step.times * sum(shape.bytes for shape in shapes),
        step.times,
      )
    )
  return work


def estimate(
  work: Sequence[Work],
  moved: Sequence[hlo.Collective],
  chip: hardware.Chip,
  mesh: Mapping[str, int],
) -> Roofline:
  """The roofline of a step.

  Args:
    work: what one device does.
    moved: what one device receives from others.
    chip: the hardware; a device is 1 / `chip.devices` of it.
    mesh: sizes of the axes over which `moved` goes.
  """
  arithmetic = memory = 0.0
  bandwidth = chip.bandwidth / chip.devices
  for one in work:
    if one.ahead:
      continue
    products = sum(
      n * chip.devices / chip.rate(kind) for kind, n in one.flops.items()
    )
    traffic = one.bytes / bandwidth
    if products >= traffic:
      arithmetic += products
    else:
      memory += traffic
  links = sum(link_seconds(one, chip, mesh) for one in moved)
  fetches = sum(one.bytes for one in work) / bandwidth
  return Roofline(arithmetic, memory, links, fetches)


def least_moved(
  trained: PyTree, frozen: PyTree, *, size: int, devices: int
) -> float | int:
  """Bytes that each device must receive in a step, at least.

  A trained parameter that is split over n devices is gathered for the forward
  and for the backward pass, and its gradient is scattered. Gradients of what r
  devices repeat are then summed over them, of which each receives
  2 (r - 1) / r. A frozen parameter is gathered once.

  Args:
    trained: placed parameters, or their shapes, that a step updates.
    frozen: those that it only reads.
    size: bytes of a number on its way.
    devices: number of all devices.
  """

  def received(leaf: Any, passes: int, *, summed: bool) -> float | int:
    count = math.prod(leaf.shape)
    part = math.prod(leaf.sharding.shard_shape(leaf.shape))
    split = count // max(part, 1)
    repeated = devices // split
    gathered = passes * count * (split - 1) / split
    return gathered + summed * 2 * part * (repeated - 1) / repeated

  leaves = [(leaf, 3, True) for leaf in jax.tree.leaves(trained)]
  leaves += [(leaf, 1, False) for leaf in jax.tree.leaves(frozen)]
  return size * sum(received(leaf, n, summed=s) for leaf, n, s in leaves)


def link_seconds(
  moved: hlo.Collective, chip: hardware.Chip, mesh: Mapping[str, int]
) -> float | int:
  """Least seconds of a collective: all links of the chip carry it.

  GPUs of several machines reach each other over the network. A collective over
  them needs it only for what no neighbour in the machine has yet; each of them
  fetches a share.
  """
  seconds = moved.bytes * chip.devices / chip.link
  devices = math.prod(mesh.values())
  if chip.is_tpu or devices <= hardware.NODE:
    return seconds
  # The axes in order, from far to near: the last one varies fastest.
  near = _inside_node(moved.axes, mesh)
  group = math.prod(mesh[axis] for axis in moved.axes)
  if near == group:
    return seconds
  # Only members of the group in other machines are reached over the network.
  # The devices of one machine want the same bytes and fetch them once, each a
  # share of 1 / near.
  beyond = moved.bytes * (group - near) / max(group - 1, 1)
  return max(seconds, beyond / near / chip.network)


def _inside_node(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
  """Devices of a group that stand in the same machine."""
  near, stride = 1, 1
  for axis in reversed(list(mesh)):
    if axis in axes:
      # Devices of this axis are `stride` apart.
      near *= max(1, min(mesh[axis], hardware.NODE // stride))
    stride *= mesh[axis]
  return near


def _products(program: hlo.Program, step: hlo.Step) -> dict[str, float | int]:
  """Operations of the matrix products and convolutions of an instruction."""
  counted = collections.Counter[str]()
  instruction = step.instruction
  if instruction.opcode == 'fusion':
    for inner in _inside(program, program.called(instruction)):
      counted.update(_of_product(inner))
  else:
    counted.update(_of_product(step))
  return dict(counted)


def _inside(
  program: hlo.Program, computation: hlo.Computation
) -> Iterator[hlo.Step]:
  """The instructions of a fusion and of the fusions in it."""
  for instruction in computation.instructions.values():
    if instruction.opcode == 'fusion':
      yield from _inside(program, program.called(instruction))
    yield hlo.Step(instruction, computation, 1)


def _of_product(step: hlo.Step) -> dict[str, float | int]:
  instruction = step.instruction
  if instruction.opcode == 'custom-call':
    return _of_kernel(step)
  if instruction.opcode not in ('dot', 'convolution'):
    return {}
  left, right = (operand.shapes[0] for operand in step.operands[:2])
  out = instruction.shapes[0]
  if instruction.opcode == 'dot':
    listed = instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or ''
    contracted = [left.dims[int(axis)] for axis in listed.split(',') if axis]
    operations = 2.0 * math.prod(out.dims) * math.prod(contracted)
  else:
    operations = _convolution(instruction, left, right, out)
  return {_type(instruction, left, right): operations}


def _of_kernel(step: hlo.Step) -> dict[str, float | int]:
  """Operations of a TPU's flash attention, padding included."""
  products = next(
    (
      kernel.executed
      for name, kernel in flops.KERNELS.items()
      if name in step.instruction.name
    ),
    0,
  )
  if not products:
    return {}
  # q, k and v [b, h, length, width] come after tables that describe the mask.
  q, k = [
    operand.shapes[0]
    for operand in step.operands
    if operand.shapes[0].dtype in _SHORT
  ][:2]
  operations = 2.0 * products * math.prod(q.dims) * k.dims[-2]
  return {_SHORT[q.dtype]: operations}


def _type(instruction: hlo.Instruction, *factors: hlo.Shape) -> str:
  """The type of a product, with its precision if that is not the default."""
  widest = max(factors, key=lambda shape: shape.bytes / math.prod(shape.dims))
  name = _SHORT.get(widest.dtype, widest.dtype)
  asked = instruction.attribute(r'operand_precision=\{(\w+)')
  precise = name == 'float32' and asked in ('high', 'highest')
  return f'{name} {asked}' if precise else name


def _convolution(
  instruction: hlo.Instruction,
  image: hlo.Shape,
  kernel: hlo.Shape,
  out: hlo.Shape,
) -> float | int:
  """Operations of a convolution; padding is no number, and not multiplied."""
  labels = instruction.attribute(r'dim_labels=([\w?]+_[\w?]+->[\w?]+)') or ''
  sides, _, last = labels.partition('->')
  first, _, middle = sides.partition('_')
  window = instruction.attribute(r'window=\{([^}]*)\}') or ''
  settings = dict(part.split('=') for part in window.split())
  spots = sorted(label for label in middle if label.isdigit())
  products = (
    out.dims[last.index('b')]
    * out.dims[last.index('f')]
    * kernel.dims[middle.index('i')]
  )

  def along(name: str, number: int, default: str) -> str:
    return settings[name].split('x')[number] if name in settings else default

  for number, label in enumerate(spots):
    low = along('pad', number, '0_0').split('_')[0]
    products *= flops.count_meetings(
      image.dims[first.index(label)],
      kernel.dims[middle.index(label)],
      out.dims[last.index(label)],
      int(along('stride', number, '1')),
      int(low),
      int(along('lhs_dilate', number, '1')),
      int(along('rhs_dilate', number, '1')),
    )
  return 2.0 * products


def _traffic(program: hlo.Program, step: hlo.Step) -> float | int:
  """Bytes that an instruction reads and writes in main memory."""
  instruction = step.instruction
  opcode = instruction.opcode
  kind = opcode.removesuffix('-start').removesuffix('-done')
  if opcode in _FREE or opcode.endswith('-done') or kind in hlo.COLLECTIVES:
    return 0.0
  if opcode == 'custom-call':
    target = instruction.attribute(r'custom_call_target="([^"]*)"')
    if target in _MARKS:
      return 0.0
  if opcode in ('copy-start', 'slice-start'):
    # (target, source, a token), of which one may be a core's own memory.
    return sum(
      instruction.shapes[0].bytes
      for shape in instruction.shapes[:2]
      if not shape.space
    )
  if opcode == 'fusion':
    return _fusion_traffic(program, step)
  written = _main(instruction.shapes)
  if opcode in _PARTIAL:
    # Read as much as is written, if the source is in main memory.
    source = step.operands[0].shapes[0]
    return written + instruction.shapes[0].bytes * (not source.space)
  if opcode == 'dynamic-update-slice':
    part = step.operands[1].shapes[0]
    return _main([part]) + part.bytes * (not instruction.shapes[0].space)
  return written + sum(_main(operand.shapes) for operand in step.operands)


def _main(shapes: Sequence[hlo.Shape]) -> float | int:
  """Bytes of those shapes that lie in main memory."""
  return sum(shape.bytes for shape in shapes if not shape.space)


def _fusion_traffic(program: hlo.Program, step: hlo.Step) -> float | int:
  inner = program.called(step.instruction)
  total = 0.0
  for number, operand in enumerate(step.operands):
    shape = operand.shapes[0]
    name = inner.parameters[number]
    if shape.space:
      continue
    total += min(shape.bytes, _read(program, inner, name))
  return total + _written(inner, step.instruction)


def _read(
  program: hlo.Program, computation: hlo.Computation, name: str
) -> float | int:
  """Bytes that a fusion reads of a parameter: all, or the slices it takes."""
  whole = computation.instructions[name].shapes[0].bytes
  total = 0.0
  for user in computation.users[name]:
    if user.opcode == 'bitcast':
      total += _read(program, computation, user.name)
    elif user.opcode in _PARTIAL and user.operands[0] == name:
      total += user.shapes[0].bytes
    elif user.opcode in hlo.COLLECTIVES:
      # Counted where it flows between chips.
      continue
    elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
      # Written in place; what it keeps is not read.
      continue
    elif user.opcode == 'fusion':
      inner = program.called(user)
      total += sum(
        _read(program, inner, inner.parameters[number])
        for number, operand in enumerate(user.operands)
        if operand == name
      )
    else:
      return whole
  return min(whole, total)


def _written(inner: hlo.Computation, fusion: hlo.Instruction) -> float | int:
  """Bytes that a fusion writes: its results, or what it changes in them."""
  root = inner.instructions[inner.root]
  parts = [inner.root]
  if root.opcode == 'tuple':
    parts = list(root.operands)
  total = 0.0
  for name, shape in zip(parts, fusion.shapes, strict=False):
    if shape.space:
      continue
    made = inner.instructions[name]
    while made.opcode == 'bitcast':
      made = inner.instructions[made.operands[0]]
    if made.opcode == 'dynamic-update-slice':
      total += inner.instructions[made.operands[1]].shapes[0].bytes
    elif made.opcode not in ('parameter', *hlo.COLLECTIVES):
      total += shape.bytes
  return total
