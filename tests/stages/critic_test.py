import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.objectives import adversarial, diffaug
from selfboottok_jax.stages import critic as critic_lib
from selfboottok_jax.stages import objective
from selfboottok_jax.training import state as state_lib
from tests import tiny
from tests.stages import tokenizers

REAL, FAKE = tiny.images(4), 0.5 * tiny.images(4, seed=1)
PLAIN = {'augment': 0.0, 'consistency': 0.0}


def _make(kind, **weights):
  goal = objective.Objective(**weights)
  critic = tokenizers.make_critic(kind, goal)
  params, stats = tiny.noise_for(critic.init, jax.random.key(0), REAL[:1])
  inputs = state_lib.LossInputs(
    params={critic_lib.GROUP: params},
    frozen=critic.frozen,
    batch={'image': REAL},
    stats=stats,
    carry={'reconstruction': FAKE},
    step=jnp.int32(0),
    rng=jax.random.key(2),
  )
  return critic, params, inputs


def _loss(critic, params, inputs):
  return jax.jit(critic.loss)(params, inputs)


@pytest.fixture(
  params=[
    pytest.param(k, marks=pytest.mark.slow if k == 'dino' else ())
    for k in tokenizers.KINDS
  ]
)
def kind(request):
  return request.param


def test_plain_loss_is_the_game_of_two_forwards(kind):
  critic, params, inputs = _make(kind, **PLAIN, hinge=0.5, lecam=0.25)
  loss, outputs = _loss(critic, params, inputs)
  assert set(outputs.metrics) == {
    f'critic/{name}_{of}'
    for name in ('logits', 'accuracy')
    for of in ('real', 'fake')
  }
  stats, logits = inputs.stats, []
  judge = jax.jit(critic.judge)
  for index, images in enumerate((REAL, FAKE)):
    key = jax.random.split(jax.random.fold_in(inputs.rng, index))[0]
    judged, stats = judge(params, stats, inputs.frozen, images, key)
    logits.append(judged)
  right = {'real': logits[0] > 0, 'fake': logits[1] < 0}
  for of, is_right in right.items():
    accuracy = outputs.metrics[f'critic/accuracy_{of}']
    np.testing.assert_allclose(accuracy, np.mean(is_right), atol=1e-6)
  hinge = adversarial.hinge_discriminator(*logits)
  regulariser, means = adversarial.lecam(inputs.stats['lecam'], *logits)
  expected = 0.5 * (hinge + 0.25 * regulariser)
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  np.testing.assert_allclose(
    outputs.stats['lecam']['real'], means['real'], rtol=1e-4
  )
  assert set(outputs.stats) == set(inputs.stats)


def test_forwards_come_in_the_order_of_the_reference(kind, monkeypatch):
  critic, params, inputs = _make(kind)
  drawn, augmented = [], []

  def draw(key, shape, strength):
    drawn.append(strength)
    return key

  def augment(images, key, strength):
    augmented.append((images, key, strength))
    return images

  monkeypatch.setattr(diffaug, 'draw', draw)
  monkeypatch.setattr(diffaug, 'augment', augment)
  loss, outputs = critic.loss(params, inputs)
  weak, strong = diffaug.WEAK, diffaug.STRONG
  assert drawn == [weak, weak, strong, strong]
  for (images, _, strength), wanted, of in zip(
    augmented, drawn, (REAL, FAKE, REAL, FAKE), strict=True
  ):
    assert strength == wanted
    np.testing.assert_array_equal(images, of)
  keys = {jax.random.key_data(key).tobytes() for _, key, _ in augmented}
  assert len(keys) == 4
  if kind == 'stylegan':
    # Without augmentation, and statistics, strong is weak.
    assert outputs.metrics['critic/consistency'] == 0
  assert np.isfinite(loss)


@pytest.mark.slow
def test_consistency_adds_its_weight(kind):
  losses = {}
  for weight in (0.5, 2.0):
    critic, params, inputs = _make(kind, consistency=weight)
    losses[weight], outputs = _loss(critic, params, inputs)
  apart = outputs.metrics['critic/consistency']
  assert apart > 1e-4
  np.testing.assert_allclose(losses[2.0] - losses[0.5], 1.5 * apart, rtol=1e-3)


@pytest.mark.slow
def test_every_forward_moves_the_statistics_on():
  critic, params, inputs = _make('dino', augment=0.0)
  _, outputs = _loss(critic, params, inputs)
  _, two = _loss(
    dataclasses.replace(critic, objective=objective.Objective(**PLAIN)),
    params,
    inputs,
  )
  norms = inputs.stats[critic_lib.GROUP]
  for after in (outputs, two):
    assert tiny.changed(norms, after.stats[critic_lib.GROUP])
  # Four forwards left more behind than two.
  assert tiny.changed(
    outputs.stats[critic_lib.GROUP], two.stats[critic_lib.GROUP]
  )
  _, after = jax.jit(critic.fooling_loss)(FAKE, inputs, jax.random.key(0))
  assert tiny.changed(norms, after[critic_lib.GROUP])
  tiny.assert_same(after['lecam'], inputs.stats['lecam'])


@pytest.mark.parametrize('augment', [0.0, 1.0])
def test_the_generator_is_judged_through_the_augmentation(
  kind, augment, monkeypatch
):
  # The upper half of each image is left.
  monkeypatch.setattr(
    diffaug, 'augment', lambda images, *_: images.at[:, 8:].set(0)
  )
  critic, _, inputs = _make(kind, augment=augment)

  @jax.jit
  @jax.grad
  def slope(x):
    return critic.fooling_loss(x, inputs, jax.random.key(5))[0]

  gradient = slope(FAKE)
  assert jnp.any(gradient[:, :8] != 0)
  assert jnp.any(gradient[:, 8:] != 0) == (augment == 0)


@pytest.mark.slow
def test_chance_comes_from_the_key_alone(kind):
  critic, params, inputs = _make(kind)
  loss = jax.jit(critic.loss)
  one, again = (loss(params, inputs)[0] for _ in range(2))
  assert one == again
  other = dataclasses.replace(inputs, rng=jax.random.key(9))
  assert loss(params, other)[0] != one


def test_only_the_trunk_is_frozen(kind):
  critic, params, _ = _make(kind)
  names = {'dino': {critic_lib.TRUNK}, 'stylegan': set()}[kind]
  assert set(critic.frozen) == names
  heads = {'head_0', 'head_1', 'head_2'}
  assert (set(params) == heads) == (kind == 'dino')


def test_gradient_of_heads_needs_no_way_back_through_the_trunk():
  critic, params, inputs = _make('dino')
  gradient = jax.grad(lambda p, i: critic.loss(p, i)[0], has_aux=False)
  jaxpr = jax.make_jaxpr(gradient)(params, inputs)
  stacks = [str(e.source_info.name_stack) for e in jaxpr.eqns]
  trunk = [s for s in stacks if critic_lib.TRUNK in s]
  assert trunk
  assert not any('transpose' in s for s in trunk)
  heads = [s for s in stacks if f'{critic_lib.GROUP})' in s]
  assert any('transpose' in s for s in heads)
