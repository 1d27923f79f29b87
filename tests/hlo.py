"""Reads the collectives in the text of a compiled program."""

import dataclasses
import re

import jax

from selfboottok_jax.training import sharding

_COMPUTATION = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_CALL = re.compile(r'\b([a-z][a-z0-9\-]*)\(([^)]*)\)')
_SHAPE = re.compile(r'\b[a-z]\w*\[([\d,]*)\]')
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
  """

  kind: str
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
  computation: str
  name: str
  kind: str
  shapes: list[tuple[int, ...]]
  operands: list[str]
  text: str


def collectives(text: str) -> list[Collective]:
  """All arrays that a program exchanges; one for each of a tuple."""
  program = list(_parse(text))
  users: dict[tuple[str, str], list[_Instruction]] = {}
  for instruction in program:
    for operand in instruction.operands:
      users.setdefault((instruction.computation, operand), []).append(
        instruction
      )
  found = []
  for instruction in program:
    kind = instruction.kind.removesuffix('-start')
    if kind not in _COLLECTIVES:
      continue
    for index, shape in enumerate(instruction.shapes):
      name = kind
      if kind == 'all-reduce' and _is_sliced(
        program, users, instruction, index
      ):
        name = 'reduce-scatter'
      found.append(Collective(name, _long(shape)))
  return found


def shared_weights(tree) -> set[tuple[int, ...]]:
  """Shapes of the weights that devices share, a block at a time."""
  shapes = set()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not leaf.sharding.is_fully_replicated:
      first = 1 if sharding.STACKED in jax.tree_util.keystr(path) else 0
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
      shapes = [
        tuple(int(n) for n in s.split(',') if n)
        for s in _SHAPE.findall(right[: call.start()])
      ]
      operands = re.findall(r'%([\w.\-]+)', call[2])
      yield _Instruction(computation, name, call[1], shapes, operands, right)


def _is_sliced(program, users, instruction, index):
  """True if result `index` of an instruction is never used as a whole."""
  uses = users.get((instruction.computation, instruction.name), [])
  if len(instruction.shapes) > 1:
    uses = [u for u in uses if re.search(rf'\bindex={index}\b', u.text)]
    return bool(uses) and all(
      _is_sliced(program, users, use, 0) for use in uses
    )
  return bool(uses) and all(
    _takes_slice(program, users, use, instruction.name) for use in uses
  )


def _takes_slice(program, users, use, operand):
  """True if an instruction reads no more than a slice of an operand."""
  if use.kind == 'dynamic-slice':
    return use.operands[0] == operand
  if use.kind in _SAME:
    return _is_sliced(program, users, use, 0)
  called = re.search(r'\b(?:calls|to_apply)=%([\w.\-]+)', use.text)
  if use.kind not in ('fusion', 'call') or called is None:
    return False
  numbers = [i for i, name in enumerate(use.operands) if name == operand]
  parameters = [
    inner
    for inner in program
    if inner.computation == called[1]
    and inner.kind == 'parameter'
    and int(re.search(r'parameter\((\d+)\)', inner.text)[1]) in numbers
  ]
  return len(parameters) == len(numbers) and all(
    _is_sliced(program, users, inner, 0) for inner in parameters
  )
