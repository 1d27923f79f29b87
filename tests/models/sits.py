"""Small SiTs, their parameters and what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.models import sit

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
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (B, SMALL['num_tokens'], SMALL['token_dim']))
  inputs = x, jax.random.uniform(keys[1], (B,)), jnp.arange(B)
  if not cls_dim:
    return inputs
  return (*inputs, jax.random.normal(keys[2], (B, cls_dim)))


@functools.cache
def params(**fields):
  given = inputs(fields.get('cls_dim', 0))
  return jax.jit(sit.SiT(**SMALL | fields).init)(jax.random.key(0), *given)


@functools.cache
def awake(**fields):
  """Parameters away from the zeros of the first step."""
  leaves, tree = jax.tree.flatten(params(**fields))
  rng = np.random.default_rng(1)
  return tree.unflatten(
    [a + 0.2 * rng.normal(size=a.shape).astype(np.float32) for a in leaves]
  )


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
