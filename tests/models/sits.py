"""Small SiTs, their parameters and what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.models import sit
from tests import tiny

SMALL = {
  'num_tokens': 4,
  'token_dim': 3,
  'num_classes': 10,
  'width': 16,
  'depth': 3,
  'heads': 2,
}
B = 6


def inputs(cls_dim=0):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(B, SMALL['num_tokens'], SMALL['token_dim']))
  inputs = (
    jnp.asarray(x, jnp.float32),
    jnp.asarray(rng.uniform(size=B), jnp.float32),
    jnp.arange(B),
  )
  if not cls_dim:
    return inputs
  return (*inputs, jnp.asarray(rng.normal(size=(B, cls_dim)), jnp.float32))


@functools.cache
def params(**fields):
  given = inputs(fields.get('cls_dim', 0))
  return jax.jit(sit.SiT(**SMALL | fields).init)(jax.random.key(0), *given)


@functools.cache
def awake(**fields):
  """Parameters away from the zeros of the first step."""
  given = inputs(fields.get('cls_dim', 0))
  init = sit.SiT(**SMALL | fields).init
  return tiny.noise_for(init, jax.random.key(0), *given)


@functools.cache
def _compiled(train, fields):
  model = sit.SiT(**SMALL | dict(fields))

  @jax.jit
  def apply(params, key, *inputs):
    rngs = None if key is None else {'dropout': key}
    return model.apply(params, *inputs, train=train, rngs=rngs)

  return apply


def run(params, *inputs, train=False, key=None, **fields):
  return _compiled(train, tuple(fields.items()))(params, key, *inputs)


def apply(params, *inputs, **options):
  """The velocity of the tokens."""
  return run(params, *inputs, **options).tokens
