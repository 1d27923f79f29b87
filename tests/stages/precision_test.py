"""Tests that products called float32 keep their precision on accelerators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.evaluation import flops
from selfboottok_jax.models import discriminators, layers, sit
from selfboottok_jax.stages import dry_run, programs
from selfboottok_jax.training import sharding
from tests import tiny as models
from tests import tpu_products
from tests.launch import tiny
from tests.models import sits

# Every network of the paper, at the smallest size that is real.
TEACHERS = {
  'data.image_size': 32,
  'networks.perceptual': 'lpips_squeeze:random',
  'networks.repa_global': 'dinov2_tiny:random',
  'networks.repa_local': 'ijepa_tiny:random',
  'networks.transport': 'vavae_tiny:random',
}
ASSUMED = {'assumed.tokenizer': 'quickstart'}
KINDS = {
  'tokenizer': ('tokenizer', {'discriminator.kind': 'dino', **TEACHERS}),
  'stylegan': ('tokenizer', {'loss.adaptive_weight': True}),
  'built_in': ('scaling', ASSUMED),
  'generator': (
    'generator',
    {'networks.teacher': 'dinov2_tiny:random', **ASSUMED},
  ),
}


def _types(kind, dtype):
  """Operations of the last phase of a training by type, attention apart."""
  task, changes = KINDS[kind]
  config = tiny.get_config(task)
  config.update_from_flattened_dict(changes)
  config.data.batch_size = 8
  config.model.dtype = dtype
  made = dry_run.abstract_task(config).task
  step_fn = programs.TrainPrograms(config, made, sharding.make_mesh())
  jaxpr = step_fn.jaxpr(max(made.milestones))
  found = flops.count_types(jaxpr, ['attn', 'cross0', 'cross1'])
  return found.pop(flops.OTHER), found


@pytest.mark.parametrize(
  'kind',
  [
    pytest.param(
      kind,
      # Half a minute to trace.
      marks=pytest.mark.slow if kind in ('tokenizer', 'stylegan') else (),
    )
    for kind in KINDS
  ],
)
def test_every_float32_product_of_a_step_asks_for_it(kind):
  outside, inside = _types(kind, 'float32')
  assert outside['float32 highest'] > 0
  for types in (outside, *inside.values()):
    assert set(types) <= {'float32 highest'}


@pytest.mark.parametrize(
  'kind', [pytest.param('tokenizer', marks=pytest.mark.slow), 'generator']
)
def test_so_does_every_one_that_bfloat16_models_keep(kind):
  outside, _ = _types(kind, 'bfloat16')
  # Inside attention some gradients of 16-bit weights are handed on in 32 bits.
  assert set(outside) == {'bfloat16', 'float32 highest'}


def test_so_does_every_one_of_a_velocity():
  model = sit.SiT(**sits.SMALL)
  x, t, labels = sits.inputs()

  params = sits.awake()

  def velocity(x):
    return model.apply(params, x, t, labels).tokens

  types = flops.count_types(jax.jit(velocity).trace(x).jaxpr, ())
  assert set(types[flops.OTHER]) == {'float32 highest'}


def _error(function, *args):
  """Returns the relative error of a function that a TPU would compute."""
  exact = jax.jit(function)(*args)
  found = tpu_products.emulated(function)(*args)
  return np.abs(found - exact).max() / np.abs(exact).max()


def _velocity(dtype):
  x, t, labels = sits.inputs()
  model, params = sit.SiT(**sits.SMALL, dtype=dtype), sits.awake()
  return lambda x: model.apply(params, x, t, labels).tokens, x


def _times(dtype):
  """The embedding of neighbouring times of a grid of 250."""
  x, _, labels = sits.inputs()
  model, params = sit.SiT(**sits.SMALL, dtype=dtype), sits.awake()
  t = jnp.asarray(np.linspace(0.5, 0.5 + (len(x) - 1) / 250, len(x)))

  def embed(t):
    _, seen = model.apply(params, x, t, labels, capture_intermediates=True)
    return seen['intermediates']['time1']['__call__'][0]

  return embed, t.astype(jnp.float32)


def _pixels(dtype):
  model, images = models.make_tokenizer(dtype=dtype), models.images(2)
  params = models.noise_for(model.init, jax.random.key(0), images)
  return lambda x: model.apply(params, x).reconstruction, images


def _logits(dtype):
  module = discriminators.StyleGanDiscriminator(
    width=8, max_width=8, dtype=dtype
  )
  images = models.images(4)
  params = models.noise_for(module.init, jax.random.key(0), images)
  return lambda x: module.apply(params, x), images


OUTPUTS = {'velocity': _velocity, 'pixels': _pixels, 'logits': _logits}


@pytest.mark.parametrize('name', [*OUTPUTS, 'times'])
def test_float32_survives_a_tpu(name, monkeypatch):
  make = OUTPUTS.get(name, _times)
  assert _error(*make('float32')) < 1e-5
  # Rounding to 16 bits, had nobody asked.
  monkeypatch.setattr(layers, 'precision', lambda dtype: None)
  assert _error(*make('float32')) > 1e-4


def test_times_are_float32_in_bfloat16_models_too():
  assert _error(*_times('bfloat16')) < 1e-5
