"""Reads the collectives in the text of a compiled program."""

import dataclasses
import re

import jax

from selfboottok_jax import placement

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_CALL = re.compile(r'\b([a-z][a-z0-9\-]*)\(([^)]*)\)')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_COLLECTIVES = (
  *('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all'),
  'collective-permute',
)
# Instructions that hand on what they are given, all of it.
_SAME = ('bitcast', 'copy', 'reshape', 'transpose', 'convert')


@dataclasses.dataclass(frozen=True)
class Collective:
  """An array that devices exchange.

  Attributes:
    kind: as HLO names it. An all-reduce of which every use is a slice is a
      'reduce-scatter': CPUs have none, other devices make one of it.
    shape: of the result on each device, axes of length 1 left out.
    dtype: as HLO names it.
  """

  kind: str
  shape: tuple[int, ...]
  dtype: str


@dataclasses.dataclass(frozen=True)
class _Instruction:
  computation: str
  name: str
  kind: str
  arrays: list[tuple[str, tuple[int, ...]]]
  operands: list[str]
  text: str


def collectives(text: str) -> list[Collective]:
  """All arrays that a program exchanges; one for each of a tuple."""
  program = _Program(_parse(text))
  found = []
  for instruction in program.instructions:
    kind = instruction.kind.removesuffix('-start')
    if kind not in _COLLECTIVES:
      continue
    for index, (dtype, shape) in enumerate(instruction.arrays):
      sliced = kind == 'all-reduce' and program.is_sliced(instruction, index)
      found.append(
        Collective('reduce-scatter' if sliced else kind, _long(shape), dtype)
      )
  return found


def shared_weights(tree) -> set[tuple[int, ...]]:
  """Shapes of the weights that devices share, a block at a time."""
  shapes = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not leaf.sharding.is_fully_replicated:
      first = 1 if placement.STACKED in jax.tree_util.keystr(path) else 0
      shapes.add(_long(leaf.shape[first:]))
  return shapes


def updated_shares(state) -> set[tuple[int, ...]]:
  """Shapes, on a device, of the parameters that several devices update."""
  shapes = set()
  for group, mean in state.ema.items():
    for leaf, other in zip(
      jax.tree.leaves(state.params[group]), jax.tree.leaves(mean), strict=True
    ):
      if not leaf.sharding.is_equivalent_to(other.sharding, leaf.ndim):
        shapes.add(_long(leaf.sharding.shard_shape(leaf.shape)))
  return shapes


def _long(shape) -> tuple[int, ...]:
  return tuple(n for n in shape if n != 1)


def _parse(text):
  computation = ''
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      computation = match[1]
    elif match := _INSTRUCTION.match(line):
      name, right = match.groups()
      call = _CALL.search(right)
      if call is None:
        continue
      arrays = [
        (dtype, tuple(int(n) for n in sizes.split(',') if n))
        for dtype, sizes in _ARRAY.findall(right[: call.start()])
      ]
      operands = re.findall(r'%([\w.\-]+)', call[2])
      yield _Instruction(computation, name, call[1], arrays, operands, right)


class _Program:
  """Instructions, and who uses them."""

  def __init__(self, instructions):
    self.instructions = list(instructions)
    self._users, self._parameters = {}, {}
    for instruction in self.instructions:
      where = instruction.computation
      for operand in instruction.operands:
        self._users.setdefault((where, operand), []).append(instruction)
      if match := re.search(r'\bparameter\((\d+)\)', instruction.text):
        self._parameters[where, int(match[1])] = instruction

  def is_sliced(self, instruction, index=0) -> bool:
    """True if result `index` of an instruction is never used as a whole."""
    name = instruction.name
    uses = self._users.get((instruction.computation, name), [])
    if len(instruction.arrays) > 1:
      uses = [u for u in uses if re.search(rf'\bindex={index}\b', u.text)]
      return bool(uses) and all(self.is_sliced(use) for use in uses)
    return bool(uses) and all(self._takes_slice(use, name) for use in uses)

  def _takes_slice(self, use, operand) -> bool:
    """True if an instruction reads no more than a slice of an operand."""
    if use.kind == 'dynamic-slice':
      return use.operands[0] == operand
    if use.kind in _SAME:
      return self.is_sliced(use)
    called = re.search(r'\b(?:calls|to_apply)=%([\w.\-]+)', use.text)
    if use.kind not in ('fusion', 'call') or called is None:
      return False
    return all(
      self.is_sliced(self._parameters[called[1], number])
      for number, name in enumerate(use.operands)
      if name == operand
    )
