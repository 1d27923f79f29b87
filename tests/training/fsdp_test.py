"""What devices exchange in a train step, read in its compiled program."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import placement
from selfboottok_jax.models import transformer
from selfboottok_jax.training import optim, sharding
from selfboottok_jax.training import state as state_lib
from tests import hlo

BATCH, LENGTH, WIDTH, DEPTH, OUT = 16, 5, 128, 3, 256


class _Network(nn.Module):
  remat: bool = False

  @nn.compact
  def __call__(self, x):
    block = functools.partial(transformer.Block, 4)
    # In a loop, as on accelerators.
    x = transformer.Stack(block, DEPTH, self.remat, unroll=1, name='blocks')(x)
    return nn.Dense(OUT, name='head')(x)


def _optimizers():
  return {'net': optim.build_optimizer(steps=10, learning_rate=1e-3)}


def _init(network):
  params = network.init(jax.random.key(0), jnp.zeros((1, LENGTH, WIDTH)))
  frozen = nn.Dense(OUT).init(jax.random.key(1), jnp.zeros((1, WIDTH)))
  state = state_lib.init_state(
    {'net': params['params']}, {}, _optimizers(), ('net',)
  )
  return state, frozen['params']


def _loss(network, trained, inputs):
  x = inputs.batch['x']
  target = nn.Dense(OUT).apply({'params': inputs.frozen}, x)
  out = network.apply({'params': trained}, x)
  return jnp.mean((out - target) ** 2), state_lib.LossOutputs({}, {}, {})


def _compile(mesh, remat=False):
  """The step on a mesh, and its state, frozen parameters and batch."""
  network = _Network(remat)
  state, frozen = jax.eval_shape(functools.partial(_init, network))
  abstract = (
    state_lib.place_abstractly(state, mesh),
    sharding.place_abstractly(frozen, mesh),
  )
  where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  placed = jax.jit(functools.partial(_init, network), out_shardings=where)()
  x = np.random.default_rng(0).normal(size=(BATCH, LENGTH, WIDTH))
  batch = sharding.put_batch({'x': x.astype(np.float32)}, mesh)
  step = state_lib.make_train_step(
    {'net': functools.partial(_loss, network)},
    _optimizers(),
    seed=0,
    ema_limit=0.9,
  )
  with jax.set_mesh(mesh):
    compiled = (
      jax.jit(step, out_shardings=(where[0], sharding.replicated(mesh)))
      .lower(*abstract, batch)
      .compile()
    )
  return compiled, (*placed, batch)


@pytest.fixture(scope='module')
def alone():
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  compiled, arguments = _compile(mesh)
  return jax.device_get(compiled(*arguments))


@pytest.mark.parametrize(
  ('shape', 'remat'),
  [
    ((1, 8), False),
    *(
      pytest.param(*values, marks=pytest.mark.slow)
      for values in (((8, 1), False), ((2, 4), False), ((1, 8), True))
    ),
  ],
)
def test_weights_travel_and_activations_do_not(shape, remat, alone):
  mesh = sharding.make_mesh(*shape)
  compiled, (state, frozen, batch) = _compile(mesh, remat)
  found = hlo.collectives(compiled.as_text())
  shared = hlo.shared_weights((state.params, frozen))
  updated = hlo.updated_shares(state)
  assert (bool(shared), bool(updated)) == (shape[1] > 1, shape[0] > 1)
  gathered = [c.shape for c in found if c.kind == 'all-gather']
  assert set(gathered) == shared | updated
  if shared:
    # Block by block, in the forward and in the backward pass.
    assert gathered.count((WIDTH, 3 * WIDTH)) == 2
  others = {c.kind for c in found} - {'all-gather'}
  assert others <= {'all-reduce', 'reduce-scatter'}
  large = placement.MIN_SIZE
  assert not [
    c for c in found if c.kind == 'all-reduce' and np.prod(c.shape) >= large
  ]
  # The same numbers as on one device.
  after, metrics = compiled(state, frozen, batch)
  np.testing.assert_allclose(metrics['loss'], alone[1]['loss'], rtol=1e-6)
  for new, expected in zip(
    jax.tree.leaves(after.ema), jax.tree.leaves(alone[0].ema), strict=True
  ):
    np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-5)
