"""The whole objective of pixels on recorded draws, over three steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import discriminators
from selfboottok_jax.objectives import diffaug, image_losses
from selfboottok_jax.pretrained import lpips
from selfboottok_jax.stages import critic as critic_lib
from selfboottok_jax.stages import objective
from selfboottok_jax.training import state as state_lib
from tests.golden import diffaug_draws, dino_weights, fixtures
from tests.pretrained import weights as weights_lib

pytestmark = pytest.mark.golden

NAME = 'tok05_vqloss'
# The critic's forward passes, in the order in which its loss makes them.
FORWARDS = ('d_real', 'd_fake', 'd_real_strong', 'd_fake_strong')


class _Case:
  """The recorded objects as ours, and which arrays were compared."""

  def __init__(self):
    self.recorded = fixtures.load('tokenizer', NAME)
    meta, arrays = self.recorded.meta, self.recorded.arrays
    goal = objective.Objective(
      adversarial=meta['disc_weight'],
      hinge=meta['disc_weight'],
      lecam=meta['lecam_loss_weight'],
      consistency=meta['disc_cr_loss_weight'],
    )
    self.critic = critic_lib.Critic(
      discriminators.DinoDiscriminator(),
      goal,
      dino_weights.trunk(NAME, meta),
    )
    self.lpips = weights_lib.lpips_of(
      {
        name: array
        for name, array in dino_weights.load(NAME, 'lpips').items()
        # Constants of the code.
        if not name.startswith('scaling_layer')
      },
      lpips.vgg(tuple(meta['channels'])),
      NAME,
    )
    self.images, self.reconstruction = (
      jnp.asarray(arrays[name].transpose(0, 2, 3, 1))
      for name in ('in_inputs', 'in_recon')
    )
    self.seen = set()

  def check(self, name, actual):
    fixtures.check(NAME, name, actual, self.recorded.arrays[name])
    self.seen.add(name)

  def draws(self, phase, forwards):
    """The recorded draws of these forwards of a phase, in this order."""
    return [
      diffaug_draws.read(self.recorded.arrays, f'in_{phase}/{forward}/')
      for forward in forwards
    ]


def _inputs(params, frozen, pair, stats):
  images, reconstruction = pair
  return state_lib.LossInputs(
    params={critic_lib.GROUP: params},
    frozen=frozen,
    batch={'image': images},
    stats=stats,
    carry={'reconstruction': reconstruction},
    step=jnp.int32(0),
    rng=jax.random.key(0),
  )


def _replay(monkeypatch, draws):
  """Lets the forwards of a trace take these draws, in this order."""
  draws = iter(draws)
  monkeypatch.setattr(diffaug, 'draw', lambda *_: next(draws))


def test_every_recorded_array(monkeypatch):
  case = _Case()
  heads = dino_weights.variables(dino_weights.load(NAME, 'heads'))
  params, norms = heads['params'], heads[discriminators.NORMS]
  stats = {
    critic_lib.GROUP: norms,
    'lecam': {side: jnp.float32(0) for side in ('real', 'fake')},
  }
  start = case.recorded.meta['disc_start']
  generator, discriminator = _programs(case, monkeypatch)
  for phase, step in (
    ('before', start - 5), ('after', start + 5), ('after2', start + 6),
  ):  # fmt: skip
    stats = _check_generator(case, generator, phase, step, params, stats)
    stats = _check_discriminator(
      case, discriminator, phase, step, params, stats
    )
  _check_what_is_left(case, params, stats[critic_lib.GROUP])
  _check_distances(case)
  outputs = {n for n in case.recorded.arrays if n.startswith('out_')}
  # An index to the norms of gradients.
  assert outputs - case.seen == {'out_d_grad_norm_names'}


def _programs(case, monkeypatch):
  """The losses of both players with their gradients, for every phase."""
  warmup_steps = case.recorded.meta['perceptual_warmup']

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def generator(
    reconstruction, images, distance, params, frozen, stats, step, weight, draws
  ):
    _replay(monkeypatch, draws)
    percept = image_losses.perceptual_loss(
      case.lpips, distance, images, reconstruction
    )
    percept *= image_losses.warm_up(step, warmup_steps)
    mse = image_losses.pixel_loss(images, reconstruction, kind='mse')
    inputs = _inputs(params, frozen, (images, reconstruction), stats)
    game, after = case.critic.fooling_loss(
      reconstruction, inputs, jax.random.key(0)
    )
    return mse + percept + weight * game, after

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def discriminator(params, frozen, pair, stats, has_begun, draws):
    _replay(monkeypatch, draws)
    inputs = _inputs(params, frozen, pair, stats)
    value, outputs = case.critic.loss(params, inputs)
    return has_begun * value, outputs.stats

  return generator, discriminator


def _check_generator(case, program, phase, step, params, stats):
  meta, arrays = case.recorded.meta, case.recorded.arrays
  # Not yet begun it is not in our program at all. There its forwards move the
  # statistics, and its weight is 0.
  weight = meta['disc_weight'] * (step >= meta['disc_start'])
  (total, after), gradient = program(
    case.reconstruction, case.images, case.lpips.params, params,
    case.critic.frozen, stats, step, weight, case.draws(phase, ['gen']),
  )  # fmt: skip
  given = arrays['in_entropy_loss'] + arrays['in_align_loss']
  case.check(f'out_{phase}/g_total', total + given)
  case.check(f'out_{phase}/g_grad_recon', gradient.transpose(0, 3, 1, 2))
  return after


def _check_discriminator(case, program, phase, step, params, stats):
  has_begun = float(step >= case.recorded.meta['disc_start'])
  (total, after), gradient = program(
    params, case.critic.frozen, (case.images, case.reconstruction), stats,
    has_begun, case.draws(phase, FORWARDS),
  )  # fmt: skip
  case.check(f'out_{phase}/d_total', total)
  norms = [
    np.linalg.norm(dino_weights.recorded_name(gradient, None, str(name)))
    for name in case.recorded.arrays['out_d_grad_norm_names']
  ]
  case.check(f'out_{phase}/d_grad_norms', np.asarray(norms))
  for side, mean in after['lecam'].items():
    case.check(f'out_{phase}/lecam_ema_{side}', mean)
  return after


def _check_what_is_left(case, params, norms):
  for name in case.recorded.arrays:
    if not name.startswith('out_final/'):
      continue
    if name.endswith('num_batches_tracked'):
      # With a fixed momentum nothing reads it, so ours does not count; it
      # tells that as many forwards were run here as there.
      value = np.int64(3 * (1 + len(FORWARDS)))
    else:
      recorded = name.removeprefix('out_final/')
      value = dino_weights.recorded_name(params, norms, recorded)
    case.check(name, value)


def _check_distances(case):
  pair = (case.images, case.reconstruction)
  case.check('out_mse', image_losses.pixel_loss(*pair, kind='mse'))
  case.check('out_lpips', jnp.mean(case.lpips(case.lpips.params, *pair)))
