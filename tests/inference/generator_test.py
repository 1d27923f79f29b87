import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, inference, placement
from selfboottok_jax.evaluation import flops
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference import generator as generator_lib
from selfboottok_jax.inference import sampling as sampling_lib
from selfboottok_jax.inference import tokenizer as tokenizer_lib
from selfboottok_jax.models import sit
from selfboottok_jax.training import checkpointing
from tests import tiny

LABELS = [0, 3, 1, 9]
SAMPLING = {'num_steps': 3}
# Image side, code width and sampler steps of tests/launch/tiny.py.
SIZE, TOKEN_DIM, STEPS = 16, 8, 2


def test_samplers_and_decoders_may_run_kernels(monkeypatch):
  """A TPU's attention kernel can be traced where samples are made."""
  fields = {'attention': 'splash', 'dtype': 'bfloat16'}
  model = tiny.make_tokenizer(**fields)
  with placement.assume_platform('tpu'):
    params = tiny.noise_for(model.init, jax.random.key(0), tiny.images(1))
  tokenizer = tokenizer_lib.ImageTokenizer(model, params['params'])
  network = sit.SiT(
    num_tokens=8, token_dim=4, num_classes=3, width=16, depth=1, heads=2,
    **fields,
  )  # fmt: skip
  inputs = jnp.zeros((1, 8, 4)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
  with placement.assume_platform('tpu'):
    of_network = tiny.noise_for(network.init, jax.random.key(1), *inputs)
  made = inference.ImageGenerator(
    network,
    of_network['params'],
    {'mean': jnp.zeros(4), 'std': jnp.ones(4)},
    tokenizer,
    class_names=('a', 'b', 'c'),
  )
  count = 4 * made.mesh.size
  integers = jax.ShapeDtypeStruct((count,), jnp.int32)
  settings = generator_lib._traced_settings(0, made.sampling)
  with placement.assume_platform('tpu'), jax.set_mesh(made.mesh):
    sampler = made._program(made.sampling).trace(
      made.params, made.statistics, integers, integers, *settings
    )
    codes = jax.ShapeDtypeStruct((count, 8, 4), jnp.float32)
    decoder = made._decoder().trace(made._decoding, codes)
  for program in (sampler, decoder):
    assert 'splash_mha_fwd' in str(program.jaxpr)


def test_sample_gives_images(generator):
  images = generator.sample(LABELS, **SAMPLING)
  assert images.shape == (4, SIZE, SIZE, 3)
  assert images.dtype == jnp.float32
  assert np.all(np.isfinite(images))
  assert np.abs(images).max() <= 1
  assert len(generator.class_names) == generator.num_classes == 10


def _codes(generator, labels, **options):
  settings = {
    'seed': 0,
    'sampler': 'sde',
    'num_steps': 3,
    'guidance_scale': 2.0,
    'guidance_low': 0.0,
    'guidance_high': 0.85,
  }
  return np.asarray(generator.sample_codes(labels, **settings | options))


def test_a_sample_is_a_function_of_seed_label_and_index(generator):
  every = _codes(generator, LABELS)
  same = np.testing.assert_array_equal
  same(_codes(generator, LABELS[:2]), every[:2])
  same(_codes(generator, LABELS[2:], indices=[2, 3]), every[2:])
  same(_codes(generator, [9, 0], indices=[3, 0]), every[[3, 0]])
  same(_codes(generator, LABELS[3:], indices=[3]), every[3:])
  relabelled = _codes(generator, [5, *LABELS[1:]])
  same(relabelled[1:], every[1:])
  for other in (
    relabelled[:1] - every[:1],
    _codes(generator, LABELS, seed=1) - every,
    _codes(generator, LABELS, indices=[4, 5, 6, 7]) - every,
  ):
    assert np.abs(other).max(axis=(1, 2)).min() > 1e-3


@functools.cache
def _on(generator, count):
  """The same generator on so many devices."""
  return inference.ImageGenerator(
    generator.model,
    jax.device_get(generator.params),
    jax.device_get(generator.statistics),
    generator.tokenizer,
    sampling=generator.sampling,
    class_names=generator.class_names,
    devices=jax.devices()[:count],
  )


def _in_batches(generator, size):
  """32 samples, `size` at a time: codes and bytes."""
  labels, codes, images = np.arange(32) % 10, [], []
  for first in range(0, 32, size):
    indices = np.arange(first, min(first + size, 32))
    options = {'indices': indices, 'seed': 3}
    codes.append(_codes(generator, labels[indices], **options))
    images.append(
      generator.sample_uint8(labels[indices], **options, **SAMPLING)
    )
  return np.concatenate(codes), np.concatenate(images)


@pytest.mark.parametrize('size', [32, 16, 7, 3, 1])
@pytest.mark.parametrize(
  'devices', [1, pytest.param(2, marks=pytest.mark.slow), 8]
)
def test_the_same_bits_in_any_batch_on_any_devices(generator, devices, size):
  wanted = _reference(_on(generator, 1))
  found = _in_batches(_on(generator, devices), size)
  for one, other in zip(wanted, found, strict=True):
    np.testing.assert_array_equal(one, other)


@functools.cache
def _reference(generator):
  return _in_batches(generator, 32)


@pytest.mark.slow
def test_memory_decides_how_many_are_sampled_at_a_time(generator):
  one = _on(generator, 1)
  sampling = dataclasses.replace(one.sampling, num_steps=3)
  # CPUs do not say how much memory they have.
  assert one.fit_device_batch(sampling) == one.device_batch == 4
  needed = {n: one._bytes_needed(sampling, n) for n in (2, 4, 8)}
  held = sum(leaf.nbytes for leaf in jax.tree.leaves(one.params))
  assert held < needed[2] < needed[4] < needed[8]
  for limit, wanted in (
    (needed[8], 8), (needed[8] - 1, 4), (needed[4] - 1, 2), (1, 1),
  ):  # fmt: skip
    found = one.fit_device_batch(sampling, most=8, limit=limit)
    assert found == wanted
  other = one.with_device_batch(8)
  assert (other.device_batch, other.round_size, one.device_batch) == (8, 8, 4)
  # The program that was measured is the one that samples.
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event)
  )
  other.sample_codes(np.arange(8), **dataclasses.asdict(sampling))
  assert not [event for event in compiled if 'backend_compile' in event]


def test_what_the_compiler_refuses_does_not_fit(generator, monkeypatch):
  one, message = _on(generator, 1), 'RESOURCE_EXHAUSTED: 20 of 16 GB'

  def refuse(*_):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(one, '_decoder', refuse)
  assert one._bytes_needed(one.sampling, 2) is None
  message = 'INTERNAL: no such kernel'
  with pytest.raises(jax.errors.JaxRuntimeError, match='no such kernel'):
    one._bytes_needed(one.sampling, 2)


def test_both_streams_are_sampled(generator):
  assert generator.model.cls_dim > 0
  # A class token that is guided otherwise changes the tokens.
  base = _codes(generator, LABELS)
  other = _codes(generator, LABELS, cls_guidance_scale=1.0)
  assert np.abs(base - other).max() > 1e-6


def _known(generator, sampling):
  """The sampler of labels and indices, its interval known in advance."""

  @jax.jit
  def run(params, latents, labels, indices):
    return generator_lib.make_codes(
      generator.model, sampling, params, latents, labels, indices,
      jnp.uint32(0), jnp.array(sampling.scales), sampling.interval,
      path=path_lib.PATHS['linear'], latent_dim=generator.tokenizer.latent_dim,
    )  # fmt: skip

  return functools.partial(run.trace, generator.params, generator.statistics)


def _sampling_flops(generator, **changes):
  """With trip counts, which an interval that is known in advance fixes."""
  sampling = dataclasses.replace(generator.sampling, num_steps=10, **changes)
  rows = jnp.zeros(generator.device_batch, jnp.int32)
  traced = _known(generator, sampling)(rows, rows)
  return flops.count(traced.jaxpr, ())[flops.OTHER].total


@pytest.mark.parametrize(
  'sampler',
  [
    'sde',
    pytest.param('ode', marks=pytest.mark.slow),
    pytest.param('heun', marks=pytest.mark.slow),
  ],
)
def test_an_unguided_interval_costs_half(generator, sampler):
  one = _on(generator, 1)
  options = {'sampler': sampler, 'guidance_scale': 2.0}
  plain = _sampling_flops(one, sampler=sampler, guidance_scale=1.0)
  always = _sampling_flops(one, guidance_low=0.0, guidance_high=1.0, **options)
  never = _sampling_flops(one, guidance_low=0.0, guidance_high=0.0, **options)
  np.testing.assert_allclose(always, 2 * plain, rtol=1e-6)
  np.testing.assert_allclose(never, plain, rtol=1e-6)
  # Five of ten steps start at t <= 0.55.
  half = _sampling_flops(one, guidance_low=0.0, guidance_high=0.55, **options)
  guided = round((half - plain) / (plain / 10))
  assert guided == 5


@pytest.mark.slow
def test_a_sweep_of_scales_and_intervals_is_one_program(generator):
  one = _on(generator, 1)
  before = len(one._compiled)
  swept = sampling_lib.sweep(
    dataclasses.replace(one.sampling, num_steps=4),
    scales=(1.5, 4.0), lows=(0.0, 0.3), highs=(0.7, 1.0),
  )  # fmt: skip
  labels = jnp.zeros(one.device_batch, jnp.int32)
  indices = jnp.arange(one.device_batch)
  found = []
  for sampling in swept:
    codes = one.sample_codes(labels, **dataclasses.asdict(sampling))
    found.append(np.asarray(codes))
  # Every argument is once each of its values.
  for index in (0, 3, 5, 6):
    compiled = _known(one, swept[index])(labels, indices).lower().compile()
    alone = compiled(one.params, one.statistics, labels, indices)
    np.testing.assert_allclose(found[index], alone, rtol=1e-4, atol=1e-4)
  (key,) = list(one._compiled)[before:]
  assert one._compiled[key]._cache_size() == 1
  # Its arguments count.
  for left, right in itertools.combinations(found, 2):
    assert np.abs(left - right).max() > 1e-3


def test_an_interval_that_meets_no_step_is_the_program_without_guidance(
  generator,
):
  one = _on(generator, 1)
  before = len(one._compiled)
  options = {'num_steps': 2, 'sampler': 'ode'}
  plain = one.sample_codes([0, 1], guidance_scale=1.0, **options)
  never = one.sample_codes(
    [0, 1], guidance_low=0.2, guidance_high=0.4, **options
  )
  assert len(one._compiled) == before + 1
  np.testing.assert_array_equal(plain, never)


def test_the_seed_changes_the_images(generator):
  first, second = (
    np.asarray(generator.sample(LABELS, seed=seed, **SAMPLING))
    for seed in (0, 1)
  )
  assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 1e-4


def test_a_scale_of_one_is_the_conditional_model(generator):
  always = {'guidance_low': 0.0, 'guidance_high': 1.0}
  plain = _codes(generator, LABELS, guidance_scale=1.0, **always)
  # With an interval that no step falls into, nothing is guided either.
  never = _codes(generator, LABELS, guidance_high=0.0)
  np.testing.assert_allclose(plain, never, atol=1e-5)
  # A hair from 1 the doubled batch is evaluated, to the same effect.
  near = _codes(generator, LABELS, guidance_scale=1 + 1e-6, **always)
  np.testing.assert_allclose(near, plain, atol=1e-4)
  assert np.abs(_codes(generator, LABELS, **always) - plain).max() > 1e-3


def test_indices_that_do_not_fit(generator):
  for indices in ([0], [-1, 0, 1, 2]):
    with pytest.raises(errors.UserError, match='one for each label'):
      generator.sample(LABELS, indices=indices, **SAMPLING)


def test_a_single_label(generator):
  images = generator.sample([3], **SAMPLING)
  assert images.shape == (1, SIZE, SIZE, 3)


@pytest.mark.parametrize(
  ('labels', 'message'),
  [
    ([0, 10], 'label 10; wanted 0 to 9'),
    ([-1], 'label -1; wanted 0 to 9'),
    ([], r'labels of shape \(0,\)'),
    ([True, False], 'type bool; wanted a list'),
  ],
)
def test_labels_that_cannot_be_sampled(unchecked, generator, labels, message):
  with pytest.raises(errors.UserError, match=message):
    unchecked(generator.sample, labels, **SAMPLING)


def test_a_scaled_tokenizer_decodes_for_the_generator(runs, tokenizer):
  scaled = inference.load_tokenizer(runs / 'scaled')
  assert scaled.fingerprint == tokenizer.fingerprint
  assert scaled.model.local2d_depth != tokenizer.model.local2d_depth
  loaded = inference.load_generator(runs / 'generator', tokenizer=scaled)
  assert loaded.step == STEPS
  for name in ('encoder', 'quantizer_global', 'decoder'):
    tiny.assert_same(scaled.params[name], tokenizer.params[name])


def test_another_tokenizer_is_refused(runs, tokenizer):
  encoder = tiny.awake(tokenizer.params['encoder'])
  other = inference.ImageTokenizer(
    tokenizer.model, tokenizer.params | {'encoder': encoder}
  )
  with pytest.raises(errors.CheckpointError, match='another tokenizer'):
    inference.load_generator(runs / 'generator', tokenizer=other)


def test_latents_are_of_the_stored_statistics(runs, tokenizer):
  run = checkpointing.read_run(str(runs / 'generator'), what='test')
  latents = run.stats['latents']
  assert latents['mean'].shape == latents['std'].shape == (TOKEN_DIM,)
  assert np.all(latents['std'] > 0)
  assert tiny.changed(latents['std'], jnp.ones(TOKEN_DIM))


@pytest.mark.parametrize('kind', ['missing', 'empty'])
def test_a_workdir_that_is_no_run(tmp_path, tokenizer, kind):
  workdir = tmp_path if kind == 'empty' else tmp_path / 'missing'
  with pytest.raises(errors.CheckpointError, match='is no run'):
    inference.load_generator(str(workdir), tokenizer=tokenizer)


def test_a_run_of_another_task_is_refused(runs, tokenizer):
  with pytest.raises(errors.CheckpointError, match="run of task 'tokenizer'"):
    inference.load_generator(runs / 'tokenizer', tokenizer=tokenizer)


def test_labels_and_indices_become_32_bits():
  labels = generator_lib.as_labels([0, 4], 5)
  assert labels.dtype == np.int32
  assert generator_lib.as_indices(None, 3).tolist() == [0, 1, 2]
  assert generator_lib.as_indices(np.array([7, 2**31 - 1]), 2).dtype == np.int32


@pytest.mark.parametrize(
  'indices', [[0], [-1, 0], [0, 2**31], [0.0, 1.0], [[0, 1]]]
)
def test_indices_of_no_samples(indices):
  with pytest.raises(errors.UserError, match='wanted 2 integers, one for each'):
    generator_lib.as_indices(indices, 2)


K, E, CHANNELS, CLASSES = 4, 6, 3, 5
MODEL = sit.SiT(K, E, CLASSES, width=8, depth=1, heads=2, cls_dim=3)


@functools.cache
def _params():
  return tiny.noise_for(
    MODEL.init,
    jax.random.key(0),
    jnp.zeros((1, K, E)),
    jnp.zeros(1),
    jnp.zeros(1, jnp.int32),
    jnp.zeros((1, 3)),
  )['params']


STATISTICS = {'mean': jnp.zeros(E), 'std': jnp.ones(E)}


def _made_codes(scales=(3.0, 3.0), statistics=STATISTICS, **settings):
  # One step: what a channel is guided by shows in that channel alone.
  sampling = inference.Sampling(
    sampler='ode', num_steps=1, guidance_high=1.0, **settings
  )
  return generator_lib.make_codes(
    MODEL,
    sampling,
    _params(),
    statistics,
    jnp.array([1, 4]),
    jnp.array([0, 7]),
    jnp.uint32(3),
    jnp.array(scales),
    sampling.interval,
    path=path_lib.PATHS['linear'],
    latent_dim=CHANNELS,
  )


def test_the_first_channels_of_every_latent_are_guided():
  plain, every = _made_codes((1.0, 1.0)), _made_codes()
  some = _made_codes(guided_channels=2)
  guided = np.arange(E) % CHANNELS < 2
  np.testing.assert_allclose(some[..., guided], every[..., guided], rtol=1e-5)
  np.testing.assert_allclose(some[..., ~guided], plain[..., ~guided], rtol=1e-5)
  assert np.abs(every - plain).max(axis=(0, 1)).min() > 1e-4


def test_codes_have_the_statistics_undone():
  shifted = {'mean': jnp.full(E, 2.0), 'std': jnp.full(E, 3.0)}
  np.testing.assert_allclose(
    _made_codes(statistics=shifted), 3 * _made_codes() + 2, rtol=1e-5, atol=1e-5
  )


def test_without_guidance_the_scales_are_not_read():
  np.testing.assert_array_equal(
    _made_codes((5.0, 5.0), guidance_scale=1.0),
    _made_codes((2.0, 2.0), guidance_scale=1.0),
  )
