"""Floating-point operations of a program, counted from its trace.

Matrix products and convolutions are counted, a multiply-add as two, as papers
and hardware peaks do. The body of a loop counts as often as it runs, which
XLA's own analysis does not do.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from selfboottok_jax.models import layers

OTHER = 'other'
# Rows of a result are padded to so many.
_ROWS = 8
# Marks of rematerialisation and reverse mode in an equation's name stack.
_RECOMPUTED, _TRANSPOSED = 'rematted_computation', 'transpose('
_WRAPPED = re.compile(r'\w+\((.*)\)')


@dataclasses.dataclass(frozen=True)
class Flops:
  """Floating-point operations of a component, by phase.

  Attributes:
    forward: operations that compute the values.
    backward: operations that compute the gradients.
    recompute: to compute again the values that rematerialisation dropped.
  """

  forward: float = 0.0
  backward: float = 0.0
  recompute: float = 0.0

  @property
  def model(self) -> float:
    """Forward and backward operations: the numerator of MFU."""
    return self.forward + self.backward

  @property
  def total(self) -> float:
    """All operations that the device executes."""
    return self.model + self.recompute

  def __add__(self, other: 'Flops') -> 'Flops':
    """Sums each phase."""
    return Flops(
      self.forward + other.forward,
      self.backward + other.backward,
      self.recompute + other.recompute,
    )

  def __mul__(self, factor: float | int) -> 'Flops':
    """Multiplies the operations of every phase by `factor`."""
    return Flops(
      self.forward * factor, self.backward * factor, self.recompute * factor
    )


def count(
  jaxpr: core.ClosedJaxpr, components: Sequence[str]
) -> dict[str, Flops]:
  """Counts the operations of a program by component.

  Args:
    jaxpr: a whole program, as `jax.jit(f).trace(...).jaxpr`; its shapes are
      global, whatever the mesh.
    components: names of scopes (`jax.named_scope`, or Flax modules). An
      operation belongs to the outermost of its scopes that is listed here, or
      to `OTHER`.

  Returns:
    Flops of every component and of `OTHER`.

  Raises:
    ValueError: a loop of unknown length multiplies matrices, or a kernel does
      not show what it multiplies.
  """
  flops = dict.fromkeys((*components, OTHER), Flops())
  for product in _walk(jaxpr.jaxpr, ''):
    component = _component(product.stack, components)
    flops[component] += _of_phase(product.stack, product.amount)
  return flops


def count_types(
  jaxpr: core.ClosedJaxpr, components: Sequence[str]
) -> dict[str, dict[str, float]]:
  """Counts the operations of a program by component and type.

  Args:
    jaxpr: a whole program, see `count`.
    components: names of scopes, see `count`.

  Returns:
    For every component and `OTHER`, operations by the wider type of the two
    factors, as 'bfloat16'. Of float32 the precision follows where one is asked
    for: 'float32 high' or 'float32 highest'.

  Raises:
    ValueError: as `count`.
  """
  types: dict[str, dict[str, float]] = {
    name: collections.defaultdict(float) for name in (*components, OTHER)
  }
  for product in _walk(jaxpr.jaxpr, ''):
    types[_component(product.stack, components)][product.kind] += product.amount
  return {name: dict(found) for name, found in types.items()}


def count_padded(
  jaxpr: core.ClosedJaxpr, components: Sequence[str], tile: int
) -> dict[str, float]:
  """Counts what a unit of square tiles multiplies for the products.

  A TPU multiplies whole tiles: its factors' contracted sides are padded to a
  multiple of `tile`, and so is one side of the result; its other side is padded
  to 8 rows. Convolutions count as they are, as compilers lay out their pixels
  and taps at will.

  Args:
    jaxpr: a whole program, see `count`.
    components: names of scopes, see `count`.
    tile: rows and columns of the unit.

  Returns:
    Operations of every component and of `OTHER`, padding included.

  Raises:
    ValueError: as `count`.
  """
  found = dict.fromkeys((*components, OTHER), 0.0)
  for product in _walk(jaxpr.jaxpr, ''):
    scale = product.padding(tile)
    found[_component(product.stack, components)] += scale * product.amount
  return found


class _Product(NamedTuple):
  """A product of a program.

  Attributes:
    stack: its name stack.
    amount: operations, all iterations of the loops around it together.
    kind: type and precision of its factors.
    sides: of one matrix product in it: rows, columns of the result, and the
      contracted side; () if there are no such sides.
    share: share of these sides' product that `amount` counts.
  """

  stack: str
  amount: float
  kind: str
  sides: tuple[int, ...] = ()
  share: float = 1.0

  def padding(self, tile: int) -> float:
    """Size of the product in whole tiles over its own, see `count_padded`."""
    if not self.sides:
      return 1.0
    rows, columns, contracted = self.sides

    def padded(length: int, to: int) -> int:
      return -(-length // to) * to

    # The compiler may multiply the transposed matrices instead.
    areas = (
      padded(a, _ROWS) * padded(b, tile)
      for a, b in ((rows, columns), (columns, rows))
    )
    whole = min(areas) * padded(contracted, tile)
    return whole / max(rows * columns * contracted, 1) / self.share


def _component(stack: str, components: Sequence[str]) -> str:
  """The component that a product belongs to."""
  return next((s for s in _scopes(stack) if s in components), OTHER)


def _walk(jaxpr: core.Jaxpr, outer: str) -> Iterator[_Product]:
  """Yields every product in a program.

  The products in a loop are multiplied by the number of its iterations.
  """
  for equation in jaxpr.eqns:
    # An inner program's stack begins where it was called.
    stack = f'{outer}/{equation.source_info.name_stack}'
    kind, parameters = equation.primitive.name, equation.params
    if not equation.outvars and not equation.effects:
      # Left over from partial evaluation; compilers drop it.
      continue
    if kind == 'pallas_call' and _kernel(stack):
      yield _of_kernel(equation, stack)
      continue
    if kind in _OPAQUE:
      raise ValueError(
        f'a {kind} in {stack} does not show what it multiplies; wanted code '
        'of matrix products, or a rule for it in flops.py'
      )
    if kind in _COUNTED:
      sides = _sides(equation) if kind == 'dot_general' else ()
      yield _Product(stack, _COUNTED[kind](equation), _type(equation), sides)
    inner = [list(_walk(j, stack)) for j in _inner_jaxprs(parameters)]
    if kind == 'cond':
      # The most expensive branch bounds the cost of the step.
      yield from max(inner, key=lambda found: sum(p.amount for p in found))
      continue
    times = 1
    if kind == 'scan':
      times = parameters['length']
    elif kind == 'shard_map':
      # The shapes in its body are those of one device.
      times = parameters['mesh'].size
    if kind == 'while' and any(inner):
      raise ValueError(
        f'a while loop in {stack} multiplies matrices an unknown number of '
        'times; wanted a scan, or a fori_loop of static length'
      )
    for found in inner:
      yield from (p._replace(amount=times * p.amount) for p in found)


def _type(equation: core.JaxprEqn) -> str:
  """The wider type of the first two inputs, and the precision if not default.

  A precision is a pair of `jax.lax.Precision`, or the name of an algorithm,
  as `BF16_BF16_F32_X3`, which makes a float32 product of three others.
  """
  inputs: Sequence[Any] = equation.invars[:2]
  types = [variable.aval.dtype for variable in inputs]
  name = max(types, key=lambda dtype: dtype.itemsize).name
  asked = equation.params.get('precision')
  asked = asked[0] if isinstance(asked, tuple) else asked
  if name != 'float32' or asked is None:
    return name
  precision = _PRECISIONS.get(asked.name, '')
  return f'{name} {precision}'.strip()


def _inner_jaxprs(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
  """Yields the programs among an equation's parameters: bodies and branches."""
  for value in parameters.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _shapes(variables: Sequence[Any]) -> list[tuple[int, ...]]:
  return [variable.aval.shape for variable in variables]


def _dot_general(equation: core.JaxprEqn) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  left, out = _shapes([equation.invars[0], equation.outvars[0]])
  return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _sides(equation: core.JaxprEqn) -> tuple[int, int, int]:
  """Rows, columns and contracted side of each matrix product."""
  (left_dims, right_dims), batch = equation.params['dimension_numbers']
  left, right = _shapes(equation.invars[:2])

  def free(shape: tuple[int, ...], *taken: Sequence[int]) -> int:
    axes = {axis for group in taken for axis in group}
    return math.prod(n for axis, n in enumerate(shape) if axis not in axes)

  return (
    free(left, left_dims, batch[0]),
    free(right, right_dims, batch[1]),
    math.prod(left[axis] for axis in left_dims),
  )


def _convolution(equation: core.JaxprEqn) -> float:
  image, kernel, out = _shapes([*equation.invars, *equation.outvars])
  how = equation.params
  (_, _, *rows), (_, inputs, *taps), (b, c, *spots) = how['dimension_numbers']
  products = out[b] * out[c] * kernel[inputs]
  for axis, (row, tap, spot) in enumerate(zip(rows, taps, spots, strict=True)):
    products *= count_meetings(
      image[row],
      kernel[tap],
      out[spot],
      how['window_strides'][axis],
      how['padding'][axis][0],
      how['lhs_dilation'][axis],
      how['rhs_dilation'][axis],
    )
  return 2.0 * products


def count_meetings(
  size: int,
  taps: int,
  out: int,
  stride: int,
  padding: int,
  inserted: int,
  spread: int,
) -> int:
  """Number of (output, kernel tap) pairs that read a value, on one axis.

  Padding and the zeros that dilation inserts are no values, so a convolution
  and both of its gradients have the same count.

  Args:
    size: values of the input.
    taps: values of the kernel.
    out: values of the output.
    stride: distance of neighbouring outputs in the input.
    padding: zeros before the input.
    inserted: dilation of the input.
    spread: dilation of the kernel.
  """
  at = np.arange(out)[:, None] * stride + np.arange(taps)[None] * spread
  at = at - padding
  inside = (at >= 0) & (at <= (size - 1) * inserted)
  return int(np.sum(inside & (at % inserted == 0)))


def _ragged_dot(equation: core.JaxprEqn) -> float:
  (rows, width), (_, _, columns) = _shapes(equation.invars[:2])
  return 2.0 * rows * width * columns


def _attention(products: int) -> Callable[[core.JaxprEqn], float]:
  """The rule of a fused kernel, whose equation has q and k as first inputs."""

  def count_products(equation: core.JaxprEqn) -> float:
    q, k = _shapes(equation.invars[:2])
    (b, queries, heads, width), keys = q, k[1]
    return 2.0 * products * b * heads * queries * keys * width

  return count_products


def _kernel(stack: str) -> str:
  """The known kernel that a pallas_call runs; '' for any other."""
  return next((name for name in KERNELS if name in stack), '')


def _of_kernel(equation: core.JaxprEqn, stack: str) -> _Product:
  """The products of a kernel of flash attention.

  Its scope says how many queries and keys there are without padding.
  """
  # Before q [b, h, k, d] there are tables of integers that describe the mask.
  inputs: Sequence[Any] = equation.invars
  floats = [
    variable.aval
    for variable in inputs
    if jnp.issubdtype(variable.aval.dtype, jnp.floating)
  ]
  *images, _, width = floats[0].shape
  found = re.findall(layers.TILED.format(r'(\d+)', r'(\d+)'), stack)[-1]
  queries, keys = (int(length) for length in found)
  products = KERNELS[_kernel(stack)].of_model
  amount = 2.0 * products * math.prod(images) * queries * keys * width
  sides = floats[0].shape[-2], floats[1].shape[-2], width
  share = queries * keys / (sides[0] * sides[1])
  return _Product(stack, amount, floats[0].dtype.name, sides, share)


class _Kernel(NamedTuple):
  """Products of a kernel.

  Attributes:
    of_model: those that the model has.
    executed: those that the kernel computes.
  """

  of_model: int
  executed: int


# Kernels of JAX's flash attention for TPUs, by how their names begin. One makes
# logits and a weighted sum, the other gradients of both and the logits again.
KERNELS = {'splash_mha_fwd': _Kernel(2, 2), 'splash_mha_dkv': _Kernel(4, 5)}
_COUNTED = {
  'dot_general': _dot_general,
  'conv_general_dilated': _convolution,
  'ragged_dot_general': _ragged_dot,
  # jax.nn.dot_product_attention with 'cudnn' is two products, the logits and
  # the weighted sum of values; each has a gradient for both of its factors.
  'dot_product_attention_fwd_wrapper': _attention(2),
  'dot_product_attention_bwd_wrapper': _attention(4),
}
# What an algorithm costs, in the words of `jax.lax.Precision`.
_PRECISIONS = {
  'HIGH': 'high',
  'HIGHEST': 'highest',
  'BF16_BF16_F32_X3': 'high',
  'TF32_TF32_F32_X3': 'high',
  'BF16_BF16_F32_X6': 'highest',
  'BF16_BF16_F32_X9': 'highest',
  'F32_F32_F32': 'highest',
}
# Kernels whose equations do not show their products.
_OPAQUE = ('pallas_call', 'ffi_call')


def _of_phase(stack: str, amount: float) -> Flops:
  """Puts operations into the phase that their name stack marks."""
  if _RECOMPUTED in stack:
    return Flops(recompute=amount)
  return Flops(backward=amount) if _TRANSPOSED in stack else Flops(amount)


def _scopes(stack: str) -> Iterator[str]:
  """Splits '/transpose(jvp(a))/b' into 'a', 'b': outermost first."""
  for part in stack.split('/'):
    name = part
    while match := _WRAPPED.fullmatch(name):
      name = match[1]
    yield name
