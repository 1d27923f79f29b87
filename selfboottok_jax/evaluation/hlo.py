"""Reads the text of a compiled program (HLO): what runs, and how often.

XLA's own analysis counts the body of a loop once. Here every instruction comes
with the number of times that it runs, and every collective with the axes of the
device mesh that it crosses.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

# Bits of the element types whose names do not say it.
_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_SHAPE = re.compile(r'(\w+)\[([\d,<=\s]*)\](\{[^}]*\})?')
_HEAD = re.compile(r'(ENTRY\s+)?%?([\w.\-#]+)\s(?:.*->.*)?\{\s*$')
_INSTRUCTION = re.compile(r'\s*(ROOT\s+)?%?([\w.\-#]+) = (.*)$')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
_NAME = re.compile(r'%([\w.\-#]+)')
# In the short form of a text that is not optimised.
_BARE = re.compile(r'[\w.\-#]+')
_COMMENT = re.compile(r'/\*.*?\*/')
_SPACE = re.compile(r'S\((\d+)\)')
# Groups that are named by the axes of a mesh, whose devices may be turned.
_NAMED = re.compile(r'mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}')
# Instructions that hand a value on as it is, for a search of constants.
_SAME = ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start')

COLLECTIVES = (
  *('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all'),
  *('ragged-all-to-all', 'collective-permute', 'collective-broadcast'),
)


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array of a program, as one device has it.

  Attributes:
    dtype: as 'bf16'.
    dims: its sizes.
    space: number of its memory; 0 is the main memory of the device.
  """

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def bytes(self) -> float:
    """Bytes of its elements, without padding."""
    bits = _BITS.get(self.dtype)
    if bits is None:
      bits = int(re.findall(r'\d+', self.dtype)[0])
    return math.prod(self.dims) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction of a computation.

  Attributes:
    name: unique in its program.
    opcode: as 'all-gather'.
    shapes: its result, or the parts of a result that is a tuple.
    operands: names of the instructions that it reads.
    literal: what stands between its brackets, for constants and parameters.
    attributes: the rest of its line.
  """

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """Finds a pattern in the attributes; returns its first group or None."""
    match = re.search(pattern, self.attributes)
    return match[1] if match else None

  @property
  def scope(self) -> str:
    """The named scopes and the operation that it was traced from, or ''."""
    return self.attribute(r'op_name="([^"]*)"') or ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """Instructions that run together: a function, a loop's body, a fusion.

  Attributes:
    name: unique in its program.
    instructions: by name, in order.
    root: name of the one that makes its result.
  """

  name: str
  instructions: Mapping[str, Instruction]
  root: str

  @functools.cached_property
  def parameters(self) -> dict[int, str]:
    """Names of its parameters by number."""
    return {
      int(i.literal): name
      for name, i in self.instructions.items()
      if i.opcode == 'parameter'
    }

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The instructions that read each of its instructions."""
    users: dict[str, list[Instruction]] = {n: [] for n in self.instructions}
    for instruction in self.instructions.values():
      for name in dict.fromkeys(instruction.operands):
        users[name].append(instruction)
    return users


@dataclasses.dataclass(frozen=True)
class Step:
  """An instruction as it runs.

  Attributes:
    instruction: the instruction.
    computation: where it stands.
    times: how often it runs; None in a loop of unknown length.
  """

  instruction: Instruction
  computation: Computation
  times: int | None

  @property
  def operands(self) -> list[Instruction]:
    """The instructions that it reads."""
    return [self.computation.instructions[n] for n in self.instruction.operands]


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over the same axes.

  Attributes:
    kind: as 'all-gather'.
    axes: axes of the mesh that it crosses.
    count: how often it runs in a step.
    bytes: bytes that each device receives in a step, if the collective sends
      no more than it must.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  bytes: float | int


class Program:
  """A compiled program, from its text.

  Attributes:
    computations: all of them, by name.
    entry: the one that runs.
  """

  def __init__(self, text: str):
    """Parses `text`, as `jax.stages.Compiled.as_text` returns it.

    Raises:
      ValueError: no computation in it is the entry.
    """
    self.computations: dict[str, Computation] = {}
    entry = None
    found: dict[str, Instruction] = {}
    name = root = ''
    for line in text.splitlines():
      if not name:
        head = _HEAD.match(line)
        if head and not line.startswith('HloModule'):
          name, found, root = head[2], {}, ''
          entry = name if head[1] else entry
      elif line.startswith('}') and not line.startswith('}}'):
        self.computations[name] = Computation(name, found, root)
        name = ''
      elif match := _INSTRUCTION.match(line):
        new = _instruction(match[2], match[3])
        for operand in new.operands:
          if operand not in found:
            found[operand] = _element(found, operand)
        found[match[2]] = new
        root = match[2] if match[1] else root
      elif found:
        # Kernels have attributes of several lines.
        last = next(reversed(found.values()))
        found[last.name] = dataclasses.replace(
          last, attributes=f'{last.attributes} {line}'
        )
    if entry is None:
      raise ValueError('this text is no HLO program: it has no ENTRY')
    self.entry = self.computations[entry]

  def steps(self, *, inside_fusions: bool = False) -> Iterator[Step]:
    """Yields every instruction that runs, loops and calls unfolded.

    Args:
      inside_fusions: whether to yield the instructions of a fusion behind it.
    """
    yield from self._steps(self.entry, 1, inside_fusions)

  def collectives(
    self, mesh: Mapping[str, int], *, scatter: bool = False
  ) -> list[Collective]:
    """Adds up the collectives of a step by kind and axes, the heaviest first.

    Args:
      mesh: size of every axis of the mesh, in order.
      scatter: count an all-reduce of which every device reads its own part as
        a reduce-scatter: compilers for accelerators make one of it.

    Raises:
      ValueError: one stands in a loop of unknown length.
    """
    sums: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    parts = set()
    for step in self.steps(inside_fusions=True):
      kind = step.instruction.opcode.removesuffix('-start')
      if kind not in COLLECTIVES:
        continue
      # A TPU overlaps a collective with several fusions, each of which names
      # it: they are parts of one.
      chain = step.instruction.attribute(r'chain_id="(\d+)"')
      if chain is not None:
        channel = step.instruction.attribute(r'channel_id=(\d+)')
        part = (self._caller_of(step), channel, chain)
        if part in parts:
          continue
        parts.add(part)
      if step.times is None:
        raise ValueError(
          f'a {kind} in {step.instruction.scope} runs an unknown number of '
          'times; wanted a scan, or a fori_loop of static length'
        )
      groups = _groups(step.instruction, mesh)
      axes = _axes(groups, mesh)
      size = groups.shape[1]
      operands = [s for i in step.operands for s in i.shapes[:1]]
      whole = sum(s.bytes for s in operands)
      # A TPU's reduce-scatter is a fusion of a sum and a slice of it.
      may_scatter = scatter or step.computation.name in self._fused_in
      if may_scatter and kind == 'all-reduce' and _is_scattered(step, size):
        kind = 'reduce-scatter'
      received = whole * _share(kind, size)
      if not axes:
        # Within one device.
        continue
      count, total = sums.get((kind, axes), (0, 0.0))
      sums[kind, axes] = (
        count + step.times,
        total + step.times * received,
      )
    found = [Collective(*key, *value) for key, value in sums.items()]
    return sorted(found, key=lambda c: -c.bytes)

  def _steps(
    self, computation: Computation, times: int | None, inside_fusions: bool
  ) -> Iterator[Step]:
    for instruction in computation.instructions.values():
      yield Step(instruction, computation, times)
      inner = times
      if instruction.opcode == 'while' and times is not None:
        trips = self.trips(instruction, computation)
        inner = None if trips is None else times * trips
      called = self._called(instruction, inside_fusions)
      if instruction.opcode == 'conditional':
        # The branch with the most instructions, as a bound.
        branches = [list(self._steps(c, inner, inside_fusions)) for c in called]
        yield from max(branches, key=len, default=[])
        continue
      for one in called:
        yield from self._steps(one, inner, inside_fusions)

  def _called(
    self, instruction: Instruction, inside_fusions: bool
  ) -> list[Computation]:
    """The computations that an instruction runs, reducers left out."""
    pattern = {
      'while': r'body=%?([\w.\-#]+)',
      'call': r'to_apply=%?([\w.\-#]+)',
      'async-start': r'calls=%?([\w.\-#]+)',
      'fusion': r'calls=%?([\w.\-#]+)',
    }.get(instruction.opcode)
    if instruction.opcode == 'conditional':
      listed = instruction.attribute(r'branch_computations=\{([^}]*)\}')
      names = _names(listed or '')
      for which in ('true', 'false'):
        name = instruction.attribute(rf'{which}_computation=%?([\w.\-#]+)')
        names += [name] if name else []
      return [self.computations[name] for name in names]
    if pattern is None or (
      instruction.opcode == 'fusion' and not inside_fusions
    ):
      return []
    name = instruction.attribute(pattern)
    return [self.computations[name]] if name else []

  def called(self, fusion: Instruction) -> Computation:
    """The computation of a fusion."""
    return self.computations[fusion.attribute(r'calls=%?([\w.\-#]+)') or '']

  def _caller_of(self, step: Step) -> str:
    """Names the computation that contains a step, or the step's fusion."""
    name = step.computation.name
    while name in self._fused_in:
      name = self._fused_in[name]
    return name

  @functools.cached_property
  def _fused_in(self) -> dict[str, str]:
    """The computation that each fused computation is called by."""
    return {
      self.called(instruction).name: computation.name
      for computation in self.computations.values()
      for instruction in computation.instructions.values()
      if instruction.opcode == 'fusion'
    }

  def trips(self, loop: Instruction, computation: Computation) -> int | None:
    """Counts the iterations of a loop; None if the program does not fix it."""
    known = loop.attribute(r'known_trip_count[^}]*?"n":"(\d+)"')
    if known:
      return int(known)
    named = {
      part: self.computations[loop.attribute(rf'{part}=%?([\w.\-#]+)') or '']
      for part in ('condition', 'body')
    }
    bound = self._bound(named['condition'])
    if bound is None:
      return None
    index, limit, direction = bound
    first = self._start(loop, computation, index)
    step = self._increment(named['body'], index)
    if first is None or step is None or not step:
      return None
    end = limit + (step > 0) - (step < 0) if direction[-1] == 'E' else limit
    if (direction[0] == 'L') != (step > 0):
      return None
    return max(0, math.ceil((end - first) / step))

  def _bound(self, condition: Computation) -> tuple[int, int, str] | None:
    """(index of the counter, limit, direction) of a loop's condition."""
    where, compare = condition, condition.instructions[condition.root]
    arguments: dict[int, Instruction] = {}
    while compare.opcode in (*_SAME, 'fusion', 'call'):
      if compare.opcode in _SAME:
        compare = where.instructions[compare.operands[0]]
        continue
      arguments = {
        number: where.instructions[name]
        for number, name in enumerate(compare.operands)
      }
      if where is not condition:
        return None
      key = 'calls' if compare.opcode == 'fusion' else 'to_apply'
      where = self.computations[
        compare.attribute(rf'{key}=%?([\w.\-#]+)') or ''
      ]
      compare = where.instructions[where.root]
    direction = compare.attribute(r'direction=(\w\w)')
    if compare.opcode != 'compare' or direction not in ('LT', 'LE', 'GT', 'GE'):
      return None
    sides = []
    for name in compare.operands:
      side = _source(where, name)
      if side.opcode == 'parameter' and where is not condition:
        side = _source(condition, arguments[int(side.literal)].name)
      sides.append(side)
    if sides[0].opcode == 'constant':
      sides.reverse()
      direction = {'L': 'G', 'G': 'L'}[direction[0]] + direction[1]
    counter, limit = sides
    if counter.opcode != 'get-tuple-element' or limit.opcode != 'constant':
      return None
    return _index(counter), int(limit.literal), direction

  def _start(
    self, loop: Instruction, computation: Computation, index: int
  ) -> int | None:
    """The first value of a loop's counter."""
    state = _source(computation, loop.operands[0])
    if state.opcode != 'tuple':
      return None
    first = _source(computation, state.operands[index])
    return int(first.literal) if first.opcode == 'constant' else None

  def _increment(self, body: Computation, index: int) -> int | None:
    """Reads the constant that a loop adds to its counter; None if none."""
    root = _source(body, body.root)
    if root.opcode != 'tuple':
      return None
    where, new = body, _source(body, root.operands[index])
    outer: list[str] = []
    if new.opcode == 'fusion':
      outer = list(new.operands)
      where = self.called(new)
      new = _source(where, where.root)
    if new.opcode != 'add':
      return None
    sides = []
    for name in new.operands:
      side = _source(where, name)
      if side.opcode == 'parameter' and where is not body:
        side = _source(body, outer[int(side.literal)])
      sides.append(side)
    steps = [int(s.literal) for s in sides if s.opcode == 'constant']
    counters = [s for s in sides if s.opcode == 'get-tuple-element']
    if len(steps) != 1 or [_index(c) for c in counters] != [index]:
      return None
    return steps[0]


def _instruction(name: str, line: str) -> Instruction:
  """Parses what stands behind the equals sign of an instruction's line."""
  end = _closing(line, 0) + 1 if line.startswith('(') else line.index(' ')
  opcode = _OPCODE.match(line, end)
  if opcode is None:
    raise ValueError(f'this line of HLO has no operation: {line[:80]}')
  close = _closing(line, opcode.end() - 1)
  inside = line[opcode.end() : close]
  literal = opcode[1] in ('constant', 'parameter')
  return Instruction(
    name,
    opcode[1],
    tuple(_shapes(line[:end])),
    () if literal else tuple(_names(inside)),
    inside if literal else '',
    line[close + 1 :],
  )


def _names(text: str) -> list[str]:
  """The names in a list of operands or computations."""
  if '%' in text:
    return _NAME.findall(text)
  return _BARE.findall(_COMMENT.sub('', text))


def _element(found: Mapping[str, Instruction], name: str) -> Instruction:
  """Part 2 of a tuple, which newer texts write as `tuple#2`."""
  whole, _, index = name.rpartition('#')
  shape = found[whole].shapes[int(index)]
  attributes = f', index={index}'
  return Instruction(
    name, 'get-tuple-element', (shape,), (whole,), '', attributes
  )


def _closing(text: str, start: int) -> int:
  """Finds the bracket that closes the one at `start`."""
  depth = 0
  for at in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[at], 0)
    if not depth:
      return at
  raise ValueError(f'a bracket stays open in this line of HLO: {text[:80]}')


def _shapes(text: str) -> Iterator[Shape]:
  for match in _SHAPE.finditer(text):
    space = _SPACE.search(match[3] or '')
    sizes = match[2].replace('<=', '').split(',')
    dims = tuple(int(size) for size in sizes if size.strip())
    yield Shape(match[1], dims, int(space[1]) if space else 0)


def _source(computation: Computation, name: str) -> Instruction:
  """Finds the instruction that computed a value, through copies of it."""
  instruction = computation.instructions[name]
  while instruction.opcode in _SAME:
    instruction = computation.instructions[instruction.operands[0]]
  return instruction


def _index(element: Instruction) -> int:
  return int(element.attribute(r'index=(\d+)') or -1)


def _share(kind: str, size: int) -> float:
  """Bytes that a device receives over those that it gives, in a group."""
  others = (size - 1) / size
  return {
    'all-gather': size - 1.0,
    'all-reduce': 2 * others,
    'reduce-scatter': others,
    'all-to-all': others,
    'ragged-all-to-all': others,
  }.get(kind, 1.0)


def _groups(instruction: Instruction, mesh: Mapping[str, int]) -> np.ndarray:
  """The devices that exchange data, a row for each group."""
  devices = math.prod(mesh.values())
  pairs = instruction.attribute(r'source_target_pairs=(\{\{.*?\}\})')
  if pairs:
    return np.reshape(_integers(pairs), (-1, 2))
  text = instruction.attribute(r'replica_groups=(.*)')
  if text is None or text.startswith('{}'):
    return np.arange(devices)[None]
  if text.startswith('{{'):
    rows = re.findall(r'\{([\d,]+)\}', text[: text.index('}}') + 1])
    return np.asarray([_integers(row) for row in rows])
  iota = re.match(r'\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', text)
  if iota:
    return _ordered(iota[3]).reshape(int(iota[1]), int(iota[2]))
  named = _NAMED.match(text)
  if named is None or ':' in named[3]:
    raise ValueError(f'groups of devices of an unknown form: {text[:80]}')
  sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
  inside = re.findall(r"'([^']*)'", named[3])
  names = list(sizes)
  grid = _ordered(named[2]) if named[2] else np.arange(devices)
  grid = grid.reshape([int(size) for size in sizes.values()])
  order = [n for n in names if n not in inside] + inside
  size = math.prod(int(sizes[n]) for n in inside)
  return grid.transpose([names.index(n) for n in order]).reshape(-1, size)


def _ordered(text: str) -> np.ndarray:
  """Devices in the order of `[2,4]T(1,0)`: counted in a grid, then turned.

  Without a grid they are listed one by one.
  """
  grid = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if grid is None:
    return np.asarray(_integers(text))
  sizes = _integers(grid[1])
  counted = np.arange(math.prod(sizes)).reshape(sizes)
  if grid[2]:
    counted = counted.transpose(_integers(grid[2]))
  return counted.flatten()


def _integers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r'\d+', text)]


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
  """The axes of the mesh along which the devices of a group differ."""
  places = np.unravel_index(groups, tuple(mesh.values()))
  return tuple(
    axis
    for axis, place in zip(mesh, places, strict=True)
    if np.any(place != place[:, :1])
  )


def _is_scattered(step: Step, size: int) -> bool:
  """True if a device reads only its own share of an all-reduce's result."""
  readers = [(step.instruction, step.instruction.shapes[0])]
  parts: list[tuple[Instruction, Shape]] = []
  while readers:
    reader, whole = readers.pop()
    for user in step.computation.users[reader.name]:
      if user.opcode == 'get-tuple-element':
        readers.append((user, user.shapes[0]))
      elif user.opcode in ('bitcast', 'reshape', 'copy'):
        readers.append((user, whole))
      else:
        parts.append((user, whole))
  return bool(parts) and all(
    user.opcode == 'dynamic-slice'
    and math.prod(user.shapes[0].dims) * size <= math.prod(whole.dims)
    for user, whole in parts
  )
