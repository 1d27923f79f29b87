"""Paths, conversions and losses: SiT's, REG's and LightningDiT's records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import samplers
from selfboottok_jax.objectives import velocity
from tests.golden import records, rounding

pytestmark = pytest.mark.golden

SIT_PATHS = {'Linear': 'linear', 'GVP': 'cosine', 'VP': 'vp'}
# Relative error of sigma on the paths whose sigma is not just t.
SIGMA_ERRORS = {'GVP': rounding.cosine_sigma, 'VP': rounding.vp_sigma}


def _names(arrays, suffix):
  """Path names in keys out.<name>.<suffix>."""
  names = [
    key.split('.')[1]
    for key in arrays
    if key.startswith('out.') and key.endswith(f'.{suffix}')
  ]
  assert names
  return names


def _swap(t, v):
  """Time and velocity to or from references in which t = 0 is noise."""
  return 1 - t, -v


def _floats(record):
  return {
    k: jnp.asarray(v) for k, v in record.arrays.items() if v.dtype.kind == 'f'
  }


def test_sit_transport():
  other = 'networks that predict scores or noise are not trained here'
  left_out = {
    'out.*.alpha_ratio': 'part of a drift that is not computed apart',
    'out.*.drift': 'a drift without the velocity; samplers move by both',
    'out.*.drift_var': 'as the drift',
    'out.*.velocity_from_score': other,
    'out.*.loss.score.*': other,
    'out.*.loss.noise.*': other,
    'out.*.ode_drift.score': other,
    'out.*.ode_drift.noise': other,
    'out.*.score.score': other,
    'out.*.score.noise': other,
    'out.*.diffusion.*': 'two forms are offered: 2 t and 2 sigma',
  }
  with records.opened('sit_transport', left_out) as record:
    arrays = _floats(record)
    data, noise = arrays['in.data'], arrays['in.noise']
    # Their velocity has the other sign.
    t, v = _swap(arrays['in.t'], arrays['in.model_out'])
    for theirs in _names(arrays, 'alpha'):
      path = path_lib.PATHS[SIT_PATHS[theirs]]
      state = path.interpolate(data, noise, t)
      target = path.velocity(data, noise, t)
      score = path.score_from_velocity(v, state, t)
      w = samplers.DIFFUSIONS['sigma'](path, t)
      # The record is norm w / 2; its constant form is the norm itself.
      norm = record.read(f'out.{theirs}.diffusion.constant')
      for array, actual in (
        ('alpha', path.alpha(t)),
        ('sigma', path.sigma(t)),
        ('d_alpha', -path.d_alpha(t)),
        ('d_sigma', -path.d_sigma(t)),
        ('xt', state),
        ('ut', -target),
        ('ode_drift.velocity', -v),
        ('score.velocity', score),
        ('score_from_velocity', score),
        (
          'score_of_true_velocity',
          path.score_from_velocity(target, state, t),
        ),
        ('noise_from_velocity', path.noise_from_velocity(v, state, t)),
        ('diffusion.sigma', norm * w / 2),
      ):
        record.check(f'out.{theirs}.{array}', actual)
      _check_data(record, theirs, path.data_from_velocity(v, state, t))
      _check_loss(record, theirs, path, arrays)


def _coefficients(record, theirs):
  """Reads the recorded coefficients, shaped to multiply a state [b, ...]."""
  return {
    name: np.float64(record.read(f'out.{theirs}.{name}'))[:, None, None, None]
    for name in ('alpha', 'sigma', 'd_alpha', 'd_sigma')
  }


def _check_data(record, theirs, found):
  arrays, path = record.arrays, _coefficients(record, theirs)
  names = ('in.model_out', 'in.data', 'in.noise')
  v, data, noise = (np.float64(arrays[name]) for name in names)
  of_sigma = SIGMA_ERRORS.get(theirs, np.zeros_like)(path['sigma'])
  error = rounding.tweedie(path, v, data, noise, of_sigma)
  array = f'out.{theirs}.data_from_velocity'
  record.check(array, found, error)
  # A sign, and the velocity's coefficient forgotten.
  x = path['alpha'] * data + path['sigma'] * noise
  det = path['d_alpha'] * path['sigma'] - path['alpha'] * path['d_sigma']
  for wrong in (
    (-path['d_sigma'] * x - path['sigma'] * v) / det,
    (-path['d_sigma'] * x + v) / det,
  ):
    record.refuse(array, wrong, error, 1e4)


def _check_loss(record, theirs, path, arrays):
  """Checks the velocity loss, whose VP target inherits the error of sigma."""
  coefficients = _coefficients(record, theirs)
  names = ('in.model_out', 'in.data', 'in.noise')
  v, data, noise = (np.float64(record.arrays[name]) for name in names)
  of_data, of_noise = (coefficients[k] for k in ('d_alpha', 'd_sigma'))
  size = np.abs(of_noise * noise)
  moved = 8 * rounding.UNIT * (np.abs(of_data * data) + size)
  if theirs == 'VP':
    moved += rounding.vp_sigma(coefficients['sigma']) * size
  difference = v - of_data * data - of_noise * noise
  error = rounding.velocity_loss(difference, moved)
  array = f'out.{theirs}.loss.velocity.None'
  record.check(array, _loss(record, theirs, path, arrays), error)
  # Without the noise in the target.
  wrong = np.mean((v - of_data * data) ** 2, axis=(1, 2, 3))
  record.refuse(array, wrong, error, 1e3)


def _loss(record, theirs, path, arrays):
  """Their training maps uniform times to the interval of the path."""
  (row,) = [
    i
    for i, config in enumerate(record.read('out.interval.names'))
    if config == f'{theirs}|velocity|eval=0|sde=0|SBDM|last=0.0'
  ]
  low, high = record.read('out.interval.t0t1')[row]
  assert high == pytest.approx(1 - path.min_time, abs=1e-12)
  s = arrays['in.t'] * (high - low) + low
  t, v = _swap(s, arrays['in.model_out'])
  return velocity.velocity_loss(
    v, arrays['in.data'], arrays['in.noise'], t, path
  )


def test_reg_convention():
  with records.opened('reg_convention') as record:
    arrays = _floats(record)
    t, x, v = (arrays[f'in.{k}'] for k in 'txv')
    data, noise = arrays['in.data'], arrays['in.noise']
    for path_name in _names(arrays, 'target'):
      path = path_lib.PATHS[path_name]
      found = {
        'alpha': path.alpha(t),
        'sigma': path.sigma(t),
        'xt': path.interpolate(data, noise, t),
        'target': path.velocity(data, noise, t),
        'score': path.score_from_velocity(v, x, t),
        'data_pred': path.data_from_velocity(v, x, t),
        'noise_pred': path.noise_from_velocity(v, x, t),
      }
      for array, actual in found.items():
        if f'out.{path_name}.{array}' in arrays:
          record.check(f'out.{path_name}.{array}', actual)
      key = f'out.{path_name}.score_via_sit'
      if key in arrays:
        record.check(key, found['score'][-len(arrays[key]) :])
    w = samplers.DIFFUSIONS['2t'](path_lib.PATHS['linear'], t)
    record.check('out.diffusion', w)


def test_lightningdit_transport():
  with records.opened('ldit_transport') as record:
    arrays, path = _floats(record), path_lib.PATHS['linear']
    # Theirs are images, ours have their channels last.
    data, noise, out = (
      jnp.moveaxis(arrays[f'in.{k}'], 1, -1)
      for k in ('data', 'noise', 'model_out')
    )
    t, v = _swap(arrays['in.t'], out)
    args = v, data, noise, t, path
    record.check('out.loss', velocity.velocity_loss(*args))
    record.check('out.cos_loss', velocity.velocity_cosine(*args))
    # The logit of t at the data is that of 1 - t at the noise, negated.
    with jax.enable_x64(True):
      draws = jnp.asarray(record.read('out.normal_draws'))
      record.check('out.t_logitnormal', 1 - path.time_at(-draws))
    for shift in record.meta['shifts']:
      times = samplers.time_grid(
        'ode', record.meta['num_steps'] - 1, shift=shift
      )
      # Theirs grow from the noise.
      grid = 1 - times
      record.check(f'out.grid_shift_{shift}', grid)
