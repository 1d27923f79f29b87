"""A few updates of a whole tokenizer task, with each kind of critic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.training import state as state_lib
from tests import tiny
from tests.stages import tokenizers

STEPS, START = 10, 6
ADVERSARIAL = {'loss/adversarial', 'discriminator_loss', 'critic/logits_real'}
ADVERSARIAL |= {'critic/logits_fake', 'critic/consistency'}
WEIGHTED = (
  'pixel',
  'perceptual',
  'adversarial',
  'repa_global',
  'repa_local',
  'transport',
  'kl',
)


# Two steps with a critic compile for a minute. tests/stages/train_test.py makes
# one of them.
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module', params=tokenizers.KINDS)
def task(request):
  return tokenizers.make_task(
    steps=STEPS,
    critic=request.param,
    loss={'adversarial_start': START / STEPS, 'perceptual_warmup': 0.2},
  )


@pytest.fixture(scope='module')
def programs(task):
  """The train step of each phase."""
  assert task.milestones == (0, START)
  return [tokenizers.make_step(task, STEPS, phase) for phase in task.milestones]


@pytest.fixture(scope='module')
def history(task, programs):
  """States and metrics of a few updates on one batch."""
  batch = {'image': tiny.images(4), 'label': jnp.zeros(4, jnp.int32)}
  states, metrics = [tokenizers.init_state(task, STEPS)], []
  for step in range(STEPS):
    step_fn = programs[step >= START]
    state, values = step_fn(states[-1], task.frozen, batch)
    states.append(state)
    metrics.append({k: float(v) for k, v in values.items()})
  return states, metrics


def test_all_terms_of_eq_4_are_there_and_finite(history):
  _, metrics = history
  named = {'fusion/weight_global', 'fusion/weight_local2d', 'train/psnr'}
  named |= {'transport/token_spread', 'transport/marginal_error'}
  terms = {f'loss/{name}' for name in WEIGHTED}
  for step, values in enumerate(metrics):
    wanted = terms | named | ADVERSARIAL
    wanted -= set() if step >= START else ADVERSARIAL
    assert wanted <= set(values)
    assert all(np.isfinite(v) for v in values.values())


def test_loss_is_the_weighted_sum(task, history):
  _, metrics = history
  o = task.objective
  weights = {name: getattr(o, name) for name in WEIGHTED}
  for name in ('repa_global', 'repa_local', 'transport'):
    weights[name] *= o.align
  for step, values in enumerate(metrics):
    weights['perceptual'] = o.perceptual * min(step / task.warmup_steps, 1)
    total = sum(
      weights[name] * values.get(f'loss/{name}', 0.0) for name in WEIGHTED
    )
    np.testing.assert_allclose(values['loss'], total, rtol=1e-4)


def test_a_repeated_batch_is_learnt(history):
  _, metrics = history
  for name in ('loss/pixel', 'loss/repa_global', 'loss/repa_local'):
    assert metrics[START - 1][name] < 0.99 * metrics[0][name], name
  assert metrics[START - 1]['train/psnr'] > metrics[0]['train/psnr']


def test_the_perceptual_distance_is_logged_without_its_warm_up(history):
  _, metrics = history
  assert metrics[0]['loss/perceptual'] > 0


def test_nothing_adversarial_before_its_start(task, history):
  states, metrics = history
  for step in range(START):
    assert ADVERSARIAL.isdisjoint(metrics[step])
    assert ('discriminator' in states[step].stats) == bool(task.critic.trunk)
    for tree in ('params', 'opt'):
      before, after = (getattr(states[n], tree) for n in (0, step + 1))
      tiny.assert_same(after['discriminator'], before['discriminator'])
    tiny.assert_same(states[step + 1].stats, states[0].stats)


def test_the_game_begins_at_its_start(history):
  states, metrics = history
  for step in range(START, STEPS):
    assert metrics[step]['loss/adversarial'] != 0
    assert metrics[step]['discriminator_grad_norm'] > 0
    before, after = states[step], states[step + 1]
    assert set(after.stats) == set(before.stats)
    for name in after.stats:
      assert tiny.changed(before.stats[name], after.stats[name]), name
    for tree in ('params', 'opt'):
      assert tiny.changed(
        getattr(before, tree)['discriminator'],
        getattr(after, tree)['discriminator'],
      )


def test_every_module_learns(history):
  states, _ = history
  first, last = states[0].params['tokenizer'], states[-1].params['tokenizer']
  heads = {
    tokenizer_lib.PROJECTOR + term for term in ('repa_global', 'repa_local')
  }
  # The teacher of the transport has the tokens' width: it needs no head.
  assert {k for k in first if k.startswith(tokenizer_lib.PROJECTOR)} == heads
  for name in first:
    assert tiny.changed(first[name], last[name]), name
  assert set(states[-1].ema) == {'tokenizer'}


def test_handed_on_reconstruction_carries_no_gradient(task):
  state = tokenizers.make_up_state(task)

  def carried(params):
    inputs = state_lib.LossInputs(
      params=state.params,
      frozen=task.frozen,
      batch={'image': tiny.images(2), 'label': jnp.zeros(2, jnp.int32)},
      stats=state.stats,
      carry={},
      step=jnp.int32(0),
      rng=jax.random.key(0),
    )
    _, outputs = task.losses(0)['tokenizer'](params, inputs)
    return jnp.sum(outputs.carry['reconstruction'])

  gradient = jax.jit(jax.grad(carried))(state.params['tokenizer'])
  assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_state_that_was_stored_goes_on_bit_for_bit(task, programs, history):
  states, _ = history
  batch = {'image': tiny.images(4), 'label': jnp.zeros(4, jnp.int32)}
  again = jax.tree.map(np.asarray, states[START + 1])
  for step in range(START + 1, STEPS):
    again, _ = programs[-1](again, task.frozen, batch)
    tiny.assert_same(again, states[step + 1])


def test_frozen_networks_are_components_and_stay_out_of_the_state(
  task, history
):
  states, _ = history
  components = {c.name: c for c in task.components(states[0].params)}
  assert len(components) == len(task.components(states[0].params))
  assert components['discriminator'].trained
  assert set(task.frozen) <= set(components)
  if task.critic.trunk:
    trunk = components['discriminator_trunk']
    assert not trunk.trained
    tiny.assert_same(trunk.params, task.critic.trunk.params)
    assert set(states[0].stats) == {'lecam', 'discriminator'}


def test_bytes_train_as_the_floats_that_they_stand_for(task):
  bytes_, floats = tokenizers.train_twice(task)
  tiny.assert_same(bytes_, floats)
