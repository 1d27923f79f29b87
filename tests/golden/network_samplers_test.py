"""Samplers on small networks: SoftVQ's, REG's, SiT's and LightningDiT's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import guidance, samplers
from selfboottok_jax.flow import path as path_lib
from tests.golden import networks, records

pytestmark = pytest.mark.golden

LINEAR = path_lib.PATHS['linear']
# Their Heun ends with an Euler step.
SOFTVQ_KINDS = {
  'ode_euler': ('ode', {}),
  'ode_heun': ('heun', {'final_step': 'euler'}),
  'sde': ('sde', {}),
}


def _steps(noise):
  """Noise by the number of a step; the last one has none."""
  return lambda i: jax.tree.map(lambda a: a[jnp.minimum(i, len(a) - 1)], noise)


def test_softvq():
  with records.opened('sampler_softvq_model') as record:
    arrays, meta = record.arrays, record.meta
    network = networks.load(record, 'softvq')
    noise = _steps(jnp.asarray(arrays['in.noise']))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(kind, case):
      sampler, options = SOFTVQ_KINDS[kind]
      _, scale, low, high = case
      if sampler == 'sde':
        options = {'noise': noise}
      return guidance.sample(
        network.velocity,
        jnp.asarray(arrays['in.x1']),
        networks.integers(arrays['in.y']),
        null_label=network.model.num_classes,
        scale=scale,
        interval=(low, high),
        sampler=sampler,
        num_steps=meta['num_steps'],
        path=LINEAR,
        **options,
      )

    for case in meta['cases']:
      for kind in SOFTVQ_KINDS:
        x = run(kind, tuple(case))
        record.check(f'out.{kind}.{case[0]}', x)
        if kind == 'sde':
          latents = x * meta['latents_std'] + meta['latents_mean']
          record.check(f'out.sde_denorm.{case[0]}', latents)


def test_reg():
  with records.opened('sampler_reg_model') as record:
    network = networks.load(record, 'reg', positions='1d')
    times = samplers.time_grid('sde', record.meta['num_steps'])
    for case in record.meta['cases']:
      states, rows = _reg(record, network, times, case)
      tokens = [network.images(x) for x in states['tokens']]
      count, prefix = len(times) - 1, f'out.{case[0]}'
      record.check(f'{prefix}.final', tokens[-1])
      record.check(f'{prefix}.final_tok', states['tokens'][-1])
      record.check(f'{prefix}.cls_final', states['cls'][-1])
      # The SDE asks once a step, at the state that it starts from.
      record.check(f'{prefix}.calls_cls', states['cls'][:-1])
      record.check(f'{prefix}.calls_t', times[:-1])
      record.check(f'{prefix}.calls_batch', np.array(rows))
      middle = [tokens[i] for i in (1, count // 2, count - 1)]
      record.check(f'{prefix}.mid_x', np.stack(middle))


def _reg(record, network, times, case):
  """All states, and the batch size of every evaluation."""
  arrays, rows = record.arrays, []
  _, scale, low, high, cls_scale = case
  tokens = jnp.stack([network.tokens(x) for x in arrays['in.noise']])
  noise = {'tokens': tokens, 'cls': jnp.asarray(arrays['in.noise_cls'])}

  def velocity(state, t, labels):
    jax.debug.callback(lambda t: rows.append(len(t)), t, ordered=True)
    out = network.apply(state['tokens'], t, labels, state['cls'])
    return {'tokens': out.tokens, 'cls': out.cls}

  @jax.jit
  def run():
    return guidance.sample(
      velocity,
      {
        'tokens': network.tokens(arrays['in.x1']),
        'cls': jnp.asarray(arrays['in.cls1']),
      },
      networks.integers(arrays['in.y']),
      null_label=network.model.num_classes,
      # Theirs is 0 where the class token is not guided.
      scale={'tokens': scale, 'cls': cls_scale or 1.0},
      interval=(low, high),
      sampler='sde',
      path=LINEAR,
      times=times,
      noise=_steps(noise),
      record=True,
    )

  states = jax.block_until_ready(run())
  jax.effects_barrier()
  return states, rows


def test_sit():
  with records.opened('sampler_sit_model') as record:
    arrays, meta = record.arrays, record.meta
    network = networks.load(record, 'sit')
    count = len(arrays['in.z'])
    noise = jnp.stack([network.tokens(x[:count]) for x in arrays['in.noise']])
    # As many times as they have steps, of which the SDE keeps the last one.
    even = 1 - np.linspace(0, 1, meta['num_steps'])
    late = samplers.time_grid('sde', meta['num_steps'])
    kinds = {
      'ode_euler': ('ode', even, {}),
      'ode_heun2': ('heun', even, {}),
      'sde': ('sde', late, {'noise': _steps(noise)}),
    }
    scales = {
      'nocfg': 1.0,
      'cfg': network.first_channels(3, meta['cfg_scale']),
    }
    for kind, (sampler, times, options) in kinds.items():
      for case, scale in scales.items():
        x = _sample(
          network,
          arrays['in.z'],
          arrays['in.y'],
          sampler,
          times,
          scale,
          **options,
        )
        # Their second half has other noise in the unguided channel.
        record.check_rows(f'out.{kind}.{case}', x)


def _sample(network, start, labels, sampler, times, scale, **options):
  def run(x):
    return guidance.sample(
      network.velocity,
      x,
      networks.integers(labels),
      null_label=network.model.num_classes,
      scale=scale,
      sampler=sampler,
      times=times,
      path=LINEAR,
      **options,
    )

  return network.images(jax.jit(run)(network.tokens(start)))


def test_lightningdit():
  seen_elsewhere = {'out.v*': 'compared with the network'}
  with records.opened('ldit_model', seen_elsewhere) as record:
    arrays, meta = record.arrays, record.meta
    network = networks.load(record, 'lightningdit')
    start = arrays['in.z'], arrays['in.y_s']
    times = 1 - np.linspace(0, 1, meta['num_steps'])
    x = _sample(network, *start, 'ode', times, 1.0)
    record.check('out.sample_nocfg', x)
    times = samplers.time_grid(
      'ode', meta['num_steps'] - 1, shift=meta['timestep_shift']
    )
    scale = network.first_channels(3, meta['cfg_scale'])
    x = _sample(
      network,
      *start,
      'ode',
      times,
      scale,
      # Guidance ends where theirs begins.
      interval=(0.0, 1 - meta['cfg_interval_start']),
    )
    record.check_rows('out.sample', x)
