"""Terms, networks, phases and weights that an objective gives a task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import pretrained
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.objectives import image_losses
from selfboottok_jax.training import state as state_lib
from tests import tiny
from tests.stages import tokenizers

# Of three groups and two blocks.
FUSION = {
  *('fusion/weight_global', 'fusion/weight_local1d', 'fusion/weight_local2d'),
  *('fusion/gate_local1d', 'fusion/gate_local1d_0', 'fusion/gate_local1d_1'),
  *('fusion/gate_local2d', 'fusion/gate_local2d_0', 'fusion/gate_local2d_1'),
}


@pytest.mark.parametrize(
  ('loss', 'critic', 'milestones', 'groups'),
  [
    ({}, None, (0,), 1),
    ({'adversarial_start': 0.0}, 'stylegan', (0,), 2),
    ({'adversarial_start': 0.5}, 'stylegan', (0, 10), 2),
  ],
)
def test_phases(loss, critic, milestones, groups):
  task = tokenizers.make_task(steps=20, critic=critic, loss=loss)
  assert task.milestones == milestones
  assert len(task.groups) == groups
  assert tuple(task.losses(milestones[-1])) == task.groups
  assert len(task.losses(0)) == (1 if len(milestones) > 1 else groups)


def _inputs(task, state):
  return state_lib.LossInputs(
    params=state.params,
    frozen=task.frozen,
    batch={'image': tiny.images(4), 'label': jnp.zeros(4, jnp.int32)},
    stats=state.stats,
    carry={},
    step=jnp.int32(10),
    rng=jax.random.key(0),
  )


def _loss(task):
  """Some state, the first group's loss in it, and its outputs."""
  state = tokenizers.make_up_state(task)
  inputs = _inputs(task, state)
  loss = jax.jit(lambda params: task.losses(10)['tokenizer'](params, inputs))
  return state, *loss(state.params['tokenizer'])


def _metrics(task):
  """The names that the first group's loss has; it is traced alone."""
  state = tokenizers.make_up_state(task)
  loss = task.losses(10)['tokenizer']
  metrics = jax.eval_shape(
    # Not the whole of its outputs, whose types are checked and say arrays.
    lambda params, inputs: loss(params, inputs)[1].metrics,
    state.params['tokenizer'],
    _inputs(task, state),
  )
  return set(metrics)


def test_weights_of_zero_remove_terms_and_networks():
  off = dict.fromkeys(('perceptual', 'align', 'kl', 'adversarial'), 0.0)
  task = tokenizers.make_task(steps=10, critic=None, loss=off)
  assert not task.networks
  assert not task.frozen
  state, value, outputs = _loss(task)
  assert set(outputs.metrics) == {'loss/pixel', 'train/psnr', *FUSION}
  assert set(state.params) == {'tokenizer'}
  assert not state.stats
  assert not any(
    k.startswith(tokenizer_lib.PROJECTOR) for k in state.params['tokenizer']
  )
  images = tiny.images(4)
  expected = image_losses.pixel_loss(
    images, outputs.carry['reconstruction'], kind='mse'
  )
  np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize('term', ['repa_global', 'repa_local', 'transport'])
def test_one_alignment_term_can_go(term):
  task = tokenizers.make_task(steps=10, loss={term: 0.0})
  others = {'perceptual', 'repa_global', 'repa_local', 'transport'} - {term}
  assert set(task.networks) == others
  assert set(task.frozen) <= others


def test_a_teacher_of_two_terms_is_one_argument_and_computes_once():
  nets = tokenizers.networks()
  assert nets['repa_global'] is nets['repa_local']
  seen = []
  nets['repa_global'] = nets['repa_local'] = _Counted(nets['repa_global'], seen)
  plain = tokenizers.make_task(steps=10)
  task = type(plain)(plain.model, plain.objective, nets, None, steps=10)
  assert 'repa_global' in task.frozen
  assert 'repa_local' not in task.frozen
  _metrics(task)
  assert len(seen) == 1


class _Counted:
  """A network that remembers each call."""

  def __init__(self, network, seen):
    self.dim, self.params = network.dim, network.params
    self._network, self._seen = network, seen

  def __call__(self, params, images):
    self._seen.append(images.shape)
    return self._network(params, images)


def test_a_baseline_has_no_local_terms():
  task = tokenizers.make_task(
    steps=10, model={'local1d_width': 0, 'local2d_depth': 0}
  )
  assert set(task.networks) == {'perceptual', 'repa_global'}
  assert {'loss/repa_local', 'loss/transport', *FUSION}.isdisjoint(
    _metrics(task)
  )


def test_a_teacher_of_another_width_gets_a_head():
  nets = tokenizers.networks()
  dim = tokenizers.DIM + 2
  nets['transport'] = pretrained.load_network('dct', patch_size=4, dim=dim)
  task = tokenizers.make_task(steps=10)
  wider = type(task)(task.model, task.objective, nets, None, steps=10)
  params, _ = jax.eval_shape(wider.init, jax.random.key(0))
  head = params['tokenizer'][tokenizer_lib.PROJECTOR + 'transport']
  assert head['layer2']['kernel'].shape == (8, dim)


@functools.cache
def _base_loss():
  return _loss(tokenizers.make_task(steps=10))[1]


@pytest.mark.slow
@pytest.mark.parametrize(
  'loss',
  [
    {'repa_mode': 'pool'},
    {'repa_mode': 'global', 'repa_input': 'quantized'},
    {'repa_local_on': 'local2d', 'ot_loss': 'debiased', 'pixel_kind': 'l1'},
  ],
  ids=lambda loss: '-'.join(loss.values()),
)
def test_switches_change_the_loss(loss):
  base = _base_loss()
  _, value, outputs = _loss(tokenizers.make_task(steps=10, loss=loss))
  assert np.isfinite(value)
  assert abs(float(value) - float(base)) > 1e-5
  assert {'loss/repa_global', 'loss/repa_local', 'loss/transport'} <= set(
    outputs.metrics
  )


def _gradient(task):
  """Gradients of a fresh tokenizer, and the outputs of its loss."""
  state = tokenizers.init_state(task)
  inputs = _inputs(task, state)
  step = jax.jit(jax.grad(task.losses(10)['tokenizer'], has_aux=True))
  return step(state.params['tokenizer'], inputs)


def _assert_close(actual, expected, **tolerances):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, **tolerances)


@pytest.mark.slow
def test_the_adaptive_weight_is_the_ratio_of_gradients():
  """Against the gradients of whole backward passes in the last kernel."""
  seen = {'align': 0.0, 'kl': 0.0, 'pixel': 0.7, 'perceptual': 1.3}
  towards, _ = _gradient(tokenizers.make_task(steps=10, critic=None, loss=seen))
  both, plain = _gradient(
    tokenizers.make_task(
      steps=10, critic='dino', loss=seen | {'adversarial': 1.0}
    )
  )
  away = jax.tree.map(lambda a, b: a - b, both, towards)
  norms = [
    jnp.linalg.norm(tree['decoder']['to_pixels']['kernel'])
    for tree in (towards, away)
  ]
  weight = 0.3 * norms[0] / (norms[1] + 1e-4)
  loss = seen | {'adversarial': 0.3, 'adaptive_weight': True}
  gradient, outputs = _gradient(
    tokenizers.make_task(steps=10, critic='dino', loss=loss)
  )
  # Neither nothing nor the weight that was given.
  assert weight > 1e-3
  assert abs(weight - 0.3) > 0.1
  found = outputs.metrics.pop('critic/adversarial_weight')
  np.testing.assert_allclose(found, weight, rtol=1e-3)
  # And the update is that of the losses with this weight.
  expected = jax.tree.map(lambda a, b: a + weight * b, towards, away)
  _assert_close(gradient, expected, rtol=1e-2, atol=1e-5)
  _assert_close(outputs.metrics, plain.metrics, rtol=1e-4)
  _assert_close(outputs.stats, plain.stats, atol=1e-5)
