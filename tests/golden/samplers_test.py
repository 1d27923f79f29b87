"""Samplers and guidance on fields in closed form: REPA's, REG's, SiT's."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import guidance, samplers
from selfboottok_jax.flow import path as path_lib
from tests.golden import analytic, fixtures, records

pytestmark = pytest.mark.golden

# REPA's Heun ends with an Euler step.
REPA_KINDS = {
  'ode_euler': ('ode', 'linear', {}),
  'ode_heun': ('heun', 'linear', {'final_step': 'euler'}),
  'sde': ('sde', 'linear', {}),
  'sde_linear': ('sde', 'linear', {}),
  'sde_cosine': ('sde', 'cosine', {}),
}
# name -> (path, the time of theirs at which their ODE ends: VP's velocity is
# infinite at the data).
SIT_PATHS = {
  'Linear': ('linear', 1.0),
  'GVP': ('cosine', 1.0),
  'VP': ('vp', 0.999),
}


def _steps(noise):
  """Noise by the number of a step; the last one has none."""
  return lambda i: jax.tree.map(lambda a: a[jnp.minimum(i, len(a) - 1)], noise)


def _repa_kinds(record, case, suffix=''):
  """Kinds of sampler recorded for a case."""
  kinds = [k for k in REPA_KINDS if f'out.{k}.{case}{suffix}' in record.arrays]
  assert kinds
  return kinds


def _repa(recorded, kind, case, *, dtype, field=None, **kwargs):
  """One recordeded case of REPA's samplers with the analytic field."""
  arrays = recorded.arrays
  sampler, path, options = REPA_KINDS[kind]
  path = path_lib.PATHS[path]
  _, scale, low, high = case
  if sampler == 'sde':
    noise = jnp.asarray(kwargs.pop('noise', arrays['in.noise']), dtype)
    options = {'noise': _steps(noise)}
  return guidance.sample(
    field or analytic.from_fixture(recorded, path),
    jnp.asarray(arrays['in.x1'], dtype),
    jnp.asarray(arrays['in.y'].astype(np.int32)),
    null_label=recorded.meta['null'],
    scale=scale,
    interval=(low, high),
    sampler=sampler,
    path=path,
    **{'num_steps': recorded.meta['num_steps']} | options | kwargs,
  )


def test_repa_in_float64_with_every_call():
  elsewhere = {
    'out.sde250.*': 'compared below',
    'out.order.*': 'compared below',
    'out.exact_ode_nocfg': 'compared below',
  }
  with records.opened('sampler_repa', elsewhere) as record:
    batch = len(record.arrays['in.y'])
    for case in record.meta['cases']:
      for kind in _repa_kinds(record, case[0], '.final'):
        path = path_lib.PATHS[REPA_KINDS[kind][1]]
        field = analytic.from_fixture(record, path, seen=[], batch=batch)
        with _wide_everywhere():
          run = functools.partial(
            _repa, record, kind, case, dtype=jnp.float64, field=field
          )
          x = jax.block_until_ready(jax.jit(run)())
          jax.effects_barrier()
        assert x.dtype == jnp.float64
        record.check(f'out.{kind}.{case[0]}.final', x)
        _check_calls(record, f'out.{kind}.{case[0]}', field.seen)


@contextlib.contextmanager
def _wide_everywhere():
  """64 bits in the threads of callbacks too, which `enable_x64` leaves out."""
  jax.config.update('jax_enable_x64', True)
  try:
    yield
  finally:
    jax.config.update('jax_enable_x64', False)


def _check_calls(record, prefix, seen):
  """States, times and batch sizes of every evaluation."""
  states, times, rows = zip(*seen, strict=True)
  record.check(f'{prefix}.calls_x', np.stack(states))
  record.check(f'{prefix}.calls_t', np.array(times))
  record.check(f'{prefix}.calls_batch', np.array(rows))


def test_repa_in_float32():
  record = records.Record('generator', 'sampler_repa')
  for case in record.meta['cases']:
    for kind in _repa_kinds(record, case[0], '.final'):
      run = functools.partial(_repa, record, kind, case, dtype=jnp.float32)
      x = jax.jit(run)()
      assert x.dtype == jnp.float32
      want = record.arrays[f'out.{kind}.{case[0]}.final']
      fixtures.check('sampler_repa.float32', 'final', x, want)


def test_repa_long_sde():
  record = records.Record('generator', 'sampler_repa')
  arrays = record.arrays
  num_steps = len(arrays['in.noise250']) + 1
  run = functools.partial(
    _repa,
    record,
    'sde_linear',
    ('long', 2.0, 0.0, 0.85),  # guided as the record's description says
    num_steps=num_steps,
    noise=arrays['in.noise250'],
    record=True,
  )
  (key,) = [k for k in arrays if k.startswith('out.sde250.t_every')]
  stride = int(key.removeprefix('out.sde250.t_every'))
  times = samplers.time_grid('sde', num_steps)[:-1:stride]
  record.check(key, times)
  with jax.enable_x64(True):
    states = jax.jit(functools.partial(run, dtype=jnp.float64))()
  record.check(f'out.sde250.x_every{stride}', states[:-1:stride])
  record.check('out.sde250.final', states[-1])
  narrow = jax.jit(functools.partial(run, dtype=jnp.float32))()
  fixtures.check(
    'sampler_repa.float32', 'sde250', narrow[-1], arrays['out.sde250.final']
  )


def test_repa_errors_at_each_number_of_steps():
  record = records.Record('generator', 'sampler_repa')
  exact = record.arrays['out.exact_ode_nocfg']
  prefix, gaps = 'out.order.', {}
  keys = [key for key in record.arrays if key.startswith(prefix)]
  for key in keys:
    kind, steps = key.removeprefix(prefix).split('_')
    with jax.enable_x64(True):
      x = _repa(
        record,
        f'ode_{kind}',
        ('nocfg', 1.0, 0.0, 1.0),
        dtype=jnp.float64,
        num_steps=int(steps),
      )
    gaps[kind, int(steps)] = gap = np.abs(np.asarray(x) - exact).max()
    record.check(key, gap)
  for (kind, steps), gap in gaps.items():
    if (kind, 2 * steps) in gaps:
      ratio = gap / gaps[kind, 2 * steps]
      order = {'euler': 2.0, 'heun': 4.0}[kind]
      assert 0.85 * order < ratio < 1.3 * order, (kind, steps, ratio)


@pytest.mark.parametrize('path', ['linear', 'cosine'])
def test_reg_in_float64_with_every_call(path):
  other = {'linear': 'cosine', 'cosine': 'linear'}[path]
  left_out = {f'out.{other}.*': 'compared under its own parameter'}
  with records.opened('sampler_reg', left_out) as record:
    times = samplers.time_grid('sde', record.meta['num_steps'])
    for case in record.meta['cases']:
      rows = []
      with jax.enable_x64(True):
        run = functools.partial(
          _reg, record, case, path_lib.PATHS[path], times, rows
        )
        states = jax.block_until_ready(jax.jit(run)())
        jax.effects_barrier()
      tokens, cls = states['tokens'], states['cls']
      assert cls.dtype == jnp.float64
      prefix = f'out.{path}.{case[0]}'
      record.check(f'{prefix}.final', tokens[-1])
      record.check(f'{prefix}.cls_final', cls[-1])
      # The SDE asks once a step, at the state that it starts from.
      record.check(f'{prefix}.calls_x', tokens[:-1])
      record.check(f'{prefix}.calls_cls', cls[:-1])
      record.check(f'{prefix}.calls_t', times[:-1])
      record.check(f'{prefix}.calls_batch', np.array(rows))


def _reg(recorded, case, path, times, rows):
  """All states of two streams that do not know of each other."""
  arrays = recorded.arrays
  _, scale, low, high, cls_scale = case
  noise = {'tokens': arrays['in.noise'], 'cls': arrays['in.noise_cls']}
  tokens = analytic.from_fixture(recorded, path)
  cls = dataclasses.replace(
    tokens, mean=arrays['in.cls_mean'], std=arrays['in.cls_std']
  )

  def velocity(state, t, labels):
    jax.debug.callback(
      lambda labels: rows.append(len(labels)), labels, ordered=True
    )
    return {
      'tokens': tokens(state['tokens'], t, labels),
      'cls': cls(state['cls'], t, labels),
    }

  return guidance.sample(
    velocity,
    {
      'tokens': jnp.asarray(arrays['in.x1']),
      'cls': jnp.asarray(arrays['in.cls1']),
    },
    jnp.asarray(arrays['in.y'].astype(np.int32)),
    null_label=recorded.meta['null'],
    # Theirs is 0 where the class token is not guided.
    scale={'tokens': scale, 'cls': cls_scale or 1.0},
    interval=(low, high),
    sampler='sde',
    times=times,
    path=path,
    noise=_steps(jax.tree.map(jnp.asarray, noise)),
    record=True,
  )


def test_sit():
  left_out = {
    'out.ode.*.midpoint': 'a solver that is not offered',
    'out.ode.*.rk4': 'a solver that is not offered',
    'out.ode.*.dopri5': 'a solver that is not offered',
    'out.sde.*.Heun.*': 'a solver that is not offered',
    'out.sde.*.Tweedie': 'a last step that is not offered',
    'out.sde.*.sigma.Euler': 'a last step that is not offered',
    'out.sde.*.sigma.None': 'a last step that is not offered',
    'out.sde.*.constant.*': 'a diffusion that is not offered',
    'out.sde.*.linear.*': 'a diffusion that is not offered',
    'out.sde.*.decreasing.*': 'a diffusion that is not offered',
    'out.sde.*.inccreasing-decreasing.*': 'a diffusion that is not offered',
    'out.sde.*.SBDM.*': 'a diffusion that is not offered',
  }
  with records.opened('sampler_sit', left_out) as record:
    num_states = record.meta['num_steps']
    forms = {
      'ode.{}.euler': {'sampler': 'ode'},
      # From data to noise.
      'ode.{}.euler_reverse': {'sampler': 'ode'},
      'ode.{}.heun2': {'sampler': 'heun', 'final_step': 'heun'},
      'sde.{}.Euler.sigma.Mean': {
        'sampler': 'sde',
        'diffusion': 'sigma',
        'noise': _steps(jnp.asarray(record.arrays['in.noise'])),
      },
    }
    for form, options in forms.items():
      for theirs, (path, end) in SIT_PATHS.items():
        key = 'out.' + form.format(theirs)
        if key not in record.arrays:
          continue
        # Their time grows from noise to data.
        times = 1 - np.linspace(0, end, num_states)
        if options['sampler'] == 'sde':
          times = samplers.time_grid('sde', num_states)
        if form.endswith('reverse'):
          times = times[::-1]
        states = _sit(record, path_lib.PATHS[path], times, options)
        # Their SDE does not keep the start.
        record.check(key, states[-num_states:])


def _sit(record, path, times, options):
  field = analytic.from_fixture(record, path)
  return guidance.sample(
    field,
    jnp.asarray(record.arrays['in.x0']),
    jnp.asarray(record.arrays['in.y'].astype(np.int32)),
    null_label=record.meta['null'],
    path=path,
    times=times,
    record=True,
    **options,
  )
