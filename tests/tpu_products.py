"""Products as a TPU computes them where nobody asks for precision."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

_CALLS = ('jit', 'pjit', 'closed_call', 'remat2', 'checkpoint',
          'custom_jvp_call', 'custom_vjp_call')  # fmt: skip
_PRODUCTS = ('dot_general', 'conv_general_dilated')


def emulated(function):
  """A function whose float32 products round their factors to bfloat16.

  Products that ask for HIGHEST stay as they are.
  """

  def run(*args):
    program, out = jax.make_jaxpr(function, return_shape=True)(*args)
    values = _evaluate(program.jaxpr, program.consts, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(out), values)

  return jax.jit(run)


def _evaluate(jaxpr, consts, *args) -> list[Any]:
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  values |= zip(jaxpr.invars, args, strict=True)

  def read(variable):
    is_literal = isinstance(variable, core.Literal)
    return variable.val if is_literal else values[variable]

  for equation in jaxpr.eqns:
    inputs, params = [read(v) for v in equation.invars], equation.params
    name = equation.primitive.name
    if name in _PRODUCTS and params['precision'] is None:
      inputs[:2] = [_rounded(x) for x in inputs[:2]]
    if name in _CALLS:
      inner = params.get('jaxpr', params.get('call_jaxpr'))
      inner_consts = getattr(inner, 'consts', ())
      inner = getattr(inner, 'jaxpr', inner)
      found = _evaluate(inner, inner_consts, *inputs)
    else:
      if name in ('scan', 'while', 'cond'):
        params = {key: _rewritten(value) for key, value in params.items()}
      found = equation.primitive.bind(*inputs, **params)
      if not equation.primitive.multiple_results:
        found = [found]
    values |= zip(equation.outvars, found, strict=True)
  return [read(v) for v in jaxpr.outvars]


def _rewritten(value):
  """The same for the programs among an equation's parameters."""
  if isinstance(value, tuple) and value:
    return tuple(_rewritten(item) for item in value)
  if not isinstance(value, core.ClosedJaxpr):
    return value
  shapes = [
    jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in value.jaxpr.invars
  ]
  return jax.make_jaxpr(
    lambda *args: _evaluate(value.jaxpr, value.consts, *args)
  )(*shapes)


def _rounded(x):
  if x.dtype != jnp.float32:
    return x
  return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
