"""The DINO discriminator: trunk, heads, gradients and what they remember."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import discriminators
from selfboottok_jax.objectives import adversarial
from selfboottok_jax.pretrained import dino
from tests.golden import dino_weights, fixtures

pytestmark = pytest.mark.golden

NAME = 'tok05_dino_disc'
MODULE = discriminators.DinoDiscriminator()
AREA = dino.View(jnp.asarray(False), jnp.int32(0), jnp.int32(0))


class _Case:
  """The recorded discriminator as ours, and which arrays were compared."""

  def __init__(self):
    self.recorded = fixtures.load('tokenizer', NAME)
    self.trunk = dino_weights.trunk(NAME, self.recorded.meta)
    heads = dino_weights.load(NAME, 'heads')
    self.variables = dino_weights.variables(heads)
    self.images = {
      kind: jnp.asarray(
        self.recorded.arrays[f'in_{kind}_u8'].transpose(0, 2, 3, 1)
        / np.float32(127.5)
        - 1
      )
      for kind in ('real', 'fake', 'small')
    }
    self.seen = set()

  def check(self, name, actual):
    fixtures.check(NAME, name, actual, self.recorded.arrays[name])
    self.seen.add(name)

  def train(self, variables, images):
    """Logits of a training forward, and the variables after it."""
    activations = self.trunk(self.trunk.params, images, AREA)
    logits, updated = MODULE.apply(
      variables, activations, train=True, mutable=[discriminators.NORMS]
    )
    return logits, variables | updated


def test_every_recorded_array():
  case = _Case()
  _check_evaluation(case)
  _check_training(case)
  _check_gradient_in_the_images(case)
  outputs = {n for n in case.recorded.arrays if n.startswith('out_')}
  # An index to the norms of gradients.
  assert outputs - case.seen == {'out_grad_norm_names'}


def _check_evaluation(case):
  images = case.images

  @jax.jit
  def judge(images, view):
    activations = case.trunk(case.trunk.params, images, view)
    return MODULE.apply(case.variables, activations), activations

  row, column = (jnp.int32(i) for i in case.recorded.meta['crop_ij'])
  crop = dino.View(jnp.asarray(True), row, column)
  logits, activations = judge(images['real'], AREA)
  case.check('out_logits_eval_area', logits)
  for i, activation in enumerate(activations):
    every = activation.transpose(0, 2, 1)[:, ::4, ::3]
    case.check(f'out_act{i}_area', every)
  for name, seen, view in (
    ('crop', images['real'], crop),
    ('small_bicubic', images['small'], AREA),
    ('224', images['real'][:, :224, :224], AREA),
  ):
    case.check(f'out_logits_eval_{name}', judge(seen, view)[0])


def _check_training(case):
  arrays, variables = case.recorded.arrays, case.variables

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def step(params):
    logits, after = {}, {}
    now = variables | {'params': params}
    for kind in ('real', 'fake'):
      logits[kind], now = case.train(now, case.images[kind])
      after[kind] = now[discriminators.NORMS]
    loss = adversarial.hinge_discriminator(logits['real'], logits['fake'])
    return loss, (logits, after)

  (loss, (logits, after)), gradient = step(variables['params'])
  case.check('out_hinge_d', loss)
  for kind, values in logits.items():
    case.check(f'out_logits_train_{kind}', values)
  _check_buffers(case, after)
  take = functools.partial(dino_weights.recorded_name, gradient, None)
  for name in arrays:
    if name.startswith('out_grad/'):
      case.check(name, take(name.removeprefix('out_grad/')))
  names = arrays['out_grad_norm_names']
  norms = np.asarray([np.linalg.norm(take(str(name))) for name in names])
  case.check('out_grad_norms', norms)


def _check_buffers(case, after):
  params = case.variables['params']
  for count, kind in enumerate(('real', 'fake'), start=1):
    norms = after[kind]
    prefix = f'out_after_{kind}/'
    for name in case.recorded.arrays:
      if not name.startswith(prefix):
        continue
      if name.endswith('num_batches_tracked'):
        # With a fixed momentum nothing reads it, so ours does not count; it
        # tells that as many forwards were run here as there.
        value = np.int64(count)
      else:
        buffer = name.removeprefix(prefix)
        value = dino_weights.recorded_name(params, norms, buffer)
      case.check(name, value)


def _check_gradient_in_the_images(case):
  @jax.jit
  def step(variables, images):
    def loss(images):
      logits, now = case.train(variables, images)
      return adversarial.hinge_generator(logits), now

    return jax.value_and_grad(loss, has_aux=True)(images)

  (loss, now), gradient = step(case.variables, case.images['small'])
  case.check('out_hinge_g_small', loss)
  case.check('out_grad_image_small', gradient.transpose(0, 3, 1, 2))
  (loss, _), gradient = step(now, case.images['fake'])
  gradient = np.asarray(gradient.transpose(0, 3, 1, 2))
  case.check('out_hinge_g_area', loss)
  case.check('out_grad_image_area_every8', gradient[:, :, ::8, 3::8])
  case.check('out_grad_image_area_norm', np.linalg.norm(gradient))
