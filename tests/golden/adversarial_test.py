"""Hinge losses, LeCAM and consistency on recorded logits, step after step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.objectives import adversarial
from tests.golden import fixtures

pytestmark = pytest.mark.golden

NAME = 'tok05_gan_losses'


@pytest.fixture(scope='module')
def recorded():
  return fixtures.load('tokenizer', NAME)


def test_every_step(recorded):
  arrays, meta = recorded.arrays, recorded.meta
  (total,) = [name for name in arrays if name.startswith('out_d_total_w')]
  weight = float(total.removeprefix('out_d_total_w'))
  state = adversarial.init_lecam()
  rows = []
  inputs = [
    jnp.asarray(arrays[f'in_{name}'])
    for name in ('real', 'fake', 'real_strong', 'fake_strong')
  ]
  for real, fake, *strong in zip(*inputs, strict=True):
    gradient = jax.grad(
      lambda real, fake, state: adversarial.lecam(
        state, real, fake, decay=meta['lecam_decay']
      )[0],
      argnums=(0, 1),
    )(real, fake, state)
    hinge = adversarial.hinge_discriminator(real, fake)
    regulariser, state = adversarial.lecam(
      state, real, fake, decay=meta['lecam_decay']
    )
    game = hinge + meta['lecam_weight'] * regulariser
    consistency = meta['cr_weight'] * adversarial.consistency(
      (real, fake), tuple(strong)
    )
    rows.append(
      {
        'out_hinge_d': hinge,
        'out_hinge_g': adversarial.hinge_generator(fake),
        'out_lecam_reg': regulariser,
        'out_ema_real': state['real'],
        'out_ema_fake': state['fake'],
        'out_grad_lecam_real': gradient[0],
        'out_grad_lecam_fake': gradient[1],
        'out_cr': consistency,
        total: weight * game + consistency,
      }
    )
  for name in rows[0]:
    actual = np.stack([np.asarray(row[name]) for row in rows])
    fixtures.check(NAME, name, actual, arrays[name])
  # Another game than the hinge's, which nothing here plays.
  outputs = {name for name in arrays if name.startswith('out_')}
  assert outputs - set(rows[0]) == {'out_vanilla_d'}
