"""Floating-point operations of a program, counted from its trace.

Counted are matrix products and convolutions, a multiply-add as two: what
papers and hardware peaks count. A loop's body counts as often as it runs,
which XLA's own analysis does not do.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend import core

OTHER = 'other'
# What reverse mode and rematerialisation write into an equation's name stack.
_RECOMPUTED, _TRANSPOSED = 'rematted_computation', 'transpose('
_WRAPPED = re.compile(r'\w+\((.*)\)')


@dataclasses.dataclass(frozen=True)
class Flops:
  """Operations of a component.

  Attributes:
    forward: of the values.
    backward: of the gradients.
    recompute: of values that rematerialisation computes a second time.
  """

  forward: float = 0.0
  backward: float = 0.0
  recompute: float = 0.0

  @property
  def model(self) -> float:
    """Without what is done twice: the numerator of MFU."""
    return self.forward + self.backward

  @property
  def total(self) -> float:
    """All that the device executes."""
    return self.model + self.recompute

  def __add__(self, other: 'Flops') -> 'Flops':
    """Of both."""
    return Flops(
      self.forward + other.forward,
      self.backward + other.backward,
      self.recompute + other.recompute,
    )

  def __mul__(self, factor: float) -> 'Flops':
    """Of so many."""
    return Flops(
      self.forward * factor, self.backward * factor, self.recompute * factor
    )


def count(
  jaxpr: core.ClosedJaxpr, components: Sequence[str]
) -> dict[str, Flops]:
  """Operations by component.

  Args:
    jaxpr: of a whole program, as `jax.jit(f).trace(...).jaxpr`; shapes in it
      are global, whatever the mesh.
    components: names of scopes (`jax.named_scope`, or of Flax modules). An
      operation belongs to the outermost of its scopes that is one of them, and
      to `OTHER` if none is.

  Returns:
    Flops of every component and of `OTHER`.

  Raises:
    ValueError: a loop of unknown length multiplies matrices, or a kernel does
      not show what it multiplies.
  """
  flops = dict.fromkeys((*components, OTHER), Flops())
  for stack, amount in _walk(jaxpr.jaxpr, ''):
    component = next((s for s in _scopes(stack) if s in components), OTHER)
    flops[component] += _of_phase(stack, amount)
  return flops


def _walk(jaxpr: core.Jaxpr, outer: str) -> Iterator[tuple[str, float]]:
  """(name stack, operations) of every product below, loops multiplied out."""
  for equation in jaxpr.eqns:
    # An inner program's stack begins where it was called.
    stack = f'{outer}/{equation.source_info.name_stack}'
    kind, parameters = equation.primitive.name, equation.params
    if kind in _OPAQUE:
      raise ValueError(
        f'a {kind} in {stack} does not show what it multiplies; wanted code '
        'of matrix products, or a rule for it in flops.py'
      )
    if kind in _COUNTED:
      yield stack, _COUNTED[kind](equation)
    inner = [list(_walk(j, stack)) for j in _inner_jaxprs(parameters)]
    if kind == 'cond':
      # The dearest branch: the one that a step must be able to pay.
      yield from max(inner, key=lambda found: sum(n for _, n in found))
      continue
    times = 1
    if kind == 'scan':
      times = parameters['length']
    elif kind == 'shard_map':
      # Its body shows one device's share.
      times = parameters['mesh'].size
    if kind == 'while' and any(inner):
      raise ValueError(
        f'a while loop in {stack} multiplies matrices an unknown number of '
        'times; wanted a scan, or a fori_loop of static length'
      )
    for found in inner:
      yield from ((where, times * n) for where, n in found)


def _inner_jaxprs(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
  for value in parameters.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item


def _dot_general(equation: core.JaxprEqn) -> float:
  (contracted, _), _ = equation.params['dimension_numbers']
  left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
  return 2.0 * math.prod(out) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: core.JaxprEqn) -> float:
  image, kernel = (variable.aval.shape for variable in equation.invars)
  out, how = equation.outvars[0].aval.shape, equation.params
  (_, _, *rows), (_, inputs, *taps), (b, c, *spots) = how['dimension_numbers']
  products = out[b] * out[c] * kernel[inputs]
  for axis, (row, tap, spot) in enumerate(zip(rows, taps, spots, strict=True)):
    products *= _met(
      image[row],
      kernel[tap],
      out[spot],
      how['window_strides'][axis],
      how['padding'][axis][0],
      how['lhs_dilation'][axis],
      how['rhs_dilation'][axis],
    )
  return 2.0 * products


def _met(size, taps, out, stride, padding, inserted, spread) -> int:
  """Pairs of an output and a kernel's tap that meet a number, on one axis.

  Neither the padding nor what dilation inserts is one; so the value and both
  gradients of a convolution have the same count.
  """
  at = np.arange(out)[:, None] * stride + np.arange(taps)[None] * spread
  at = at - padding
  inside = (at >= 0) & (at <= (size - 1) * inserted)
  return int(np.sum(inside & (at % inserted == 0)))


def _ragged_dot(equation: core.JaxprEqn) -> float:
  (rows, width), (_, _, columns) = (
    variable.aval.shape for variable in equation.invars[:2]
  )
  return 2.0 * rows * width * columns


def _attention(products: int):
  """Of a fused kernel, whose trace is one equation with q and k in front."""

  def count_products(equation: core.JaxprEqn) -> float:
    b, queries, heads, width = equation.invars[0].aval.shape
    keys = equation.invars[1].aval.shape[1]
    return 2.0 * products * b * heads * queries * keys * width

  return count_products


_COUNTED = {
  'dot_general': _dot_general,
  'conv_general_dilated': _convolution,
  'ragged_dot_general': _ragged_dot,
  # jax.nn.dot_product_attention with 'cudnn': logits and mixture; and for each
  # of the two a gradient on either side.
  'dot_product_attention_fwd_wrapper': _attention(2),
  'dot_product_attention_bwd_wrapper': _attention(4),
}
# Kernels that say nothing of what they multiply.
_OPAQUE = ('pallas_call', 'ffi_call')


def _of_phase(stack: str, amount: float) -> Flops:
  if _RECOMPUTED in stack:
    return Flops(recompute=amount)
  return Flops(backward=amount) if _TRANSPOSED in stack else Flops(amount)


def _scopes(stack: str) -> Iterator[str]:
  """'/transpose(jvp(a))/b' to 'a', 'b': outermost first."""
  for part in stack.split('/'):
    name = part
    while match := _WRAPPED.fullmatch(name):
      name = match[1]
    yield name
