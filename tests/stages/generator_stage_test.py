import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import data, errors, inference, pixels, pretrained
from selfboottok_jax.evaluation import evaluate, frechet
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.stages import generator as stages_generator
from selfboottok_jax.stages import generator_stage
from selfboottok_jax.training import sharding
from selfboottok_jax.training import state as state_lib
from tests import tiny
from tests.launch import tiny as launch_tiny
from tests.stages import generators

CLASSES = 3


@pytest.fixture(scope='module')
def batches():
  return tiny.padded_batches(CLASSES)


@pytest.fixture(scope='module')
def params():
  model = tiny.make_tokenizer()
  return tiny.awake(
    tiny.noise_for(model.init, jax.random.key(0), tiny.images(1))['params']
  )


def _state(params, ema, stats):
  return state_lib.TrainState(jnp.int32(0), params, ema, {}, stats)


def test_velocity_of_a_fresh_model_is_the_power_of_its_target(batches, params):
  task = generators.make_task(params)
  fresh, stats = jax.jit(task.init)(jax.random.key(0))
  state = _state(fresh, fresh, stats)
  evaluator = generator_stage.Velocity(
    task, batches, sharding.make_mesh(), task.frozen
  )
  first, second = dict(evaluator.run(state)), dict(evaluator.run(state))
  # Fixed times and noise: no difference between two evaluations.
  assert first == second
  # Codes have unit RMS, so noise minus data has power 2.
  np.testing.assert_allclose(first['velocity_loss'], 2.0, rtol=0.2)
  assert set(first) == {'velocity_loss', 'velocity_loss_gaussian', 'cls_loss'}
  # Of strata, the integral pi / 2.
  np.testing.assert_allclose(
    first['velocity_loss_gaussian'], np.pi / 2, rtol=0.05
  )


@pytest.mark.parametrize('name', list(path_lib.PATHS))
def test_gaussian_baseline_is_what_regression_leaves(name):
  path, rng = path_lib.PATHS[name], np.random.default_rng(0)
  x, noise = rng.normal(size=(2, 200_000))
  for time in (0.3, 0.8):
    t = jnp.array([time])
    alpha, sigma = float(path.alpha(t)[0]), float(path.sigma(t)[0])
    target = float(path.d_alpha(t)[0]) * x + float(path.d_sigma(t)[0]) * noise
    seen = alpha * x + sigma * noise
    slope = np.mean(target * seen) / np.mean(seen**2)
    left = np.mean((target - slope * seen) ** 2)
    np.testing.assert_allclose(
      generator_stage._gaussian_loss(path, t)[0], left, rtol=0.03
    )


@pytest.mark.parametrize('kind', ['scalar', 'channel'])
def test_codes_are_measured_in_batches_that_all_devices_share(params, kind):
  task = generators.plain_task(
    params, latent_statistics=kind, statistics_images=13
  )
  config = launch_tiny.get_config('generator')
  config.data.batch_size, config.evaluation.batch_size = 64, 8
  source = data.open_source('procedural', '', 'train', 16)
  encoder, seen = task.encoders.tokenizer, []

  def encode(params, images):
    seen.append(images.shape[0])
    return encoder.encode(params, images)

  watched = dataclasses.replace(
    task.encoders, tokenizer=dataclasses.replace(encoder, encode=encode)
  )
  task = stages_generator.GeneratorTask(task.model, task.objective, watched)
  measured = generator_stage.code_statistics(
    config, task, source, sharding.make_mesh()
  )
  # Not the 64 of the training, on a single device.
  assert seen == [8]
  rows = data.make_eval_dataset(
    source, batch_size=13, image_size=16, num_images=13
  )
  (batch,) = rows
  codes = encoder.encode(
    encoder.params, jnp.asarray(pixels.to_float(batch['image']))
  )
  wanted = generator_stage.measure_codes([np.asarray(codes)], kind)
  for name in ('mean', 'std'):
    np.testing.assert_allclose(measured[name], wanted[name], rtol=1e-5)


NAMES, COUNT = ('a', 'b', 'c'), 12


@pytest.fixture(scope='module')
def parts():
  params = generators.tokenizer_params()
  task = generators.make_task(params)
  tokenizer = inference.ImageTokenizer(tiny.make_tokenizer(), params)
  network = pretrained.load_network('hog', patch_size=4)
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
  batches = [
    {'image': images, 'mask': np.arange(8) < 7},
  ]
  evaluator = generator_stage.SampleDistance(
    task,
    tokenizer,
    inference.Sampling(num_steps=3),
    network,
    batches,
    num_samples=COUNT,
    batch_size=5,
    class_names=NAMES,
  )
  return task, tokenizer, network, images, evaluator


def _task_state(task, seed):
  params, stats = tiny.noise_for(task.init, jax.random.key(seed))
  params = {'generator': tiny.awake(params['generator'])}
  return state_lib.TrainState(
    step=np.int32(0), params=params, ema=params, opt={}, stats=stats
  )


@pytest.mark.parametrize(('count', 'processes'), [(1, 1), (3, 4)])
def test_every_process_needs_a_sample_and_a_covariance_two(
  parts, monkeypatch, count, processes
):
  task, tokenizer, network, *_ = parts
  monkeypatch.setattr(jax, 'process_count', lambda: processes)
  with pytest.raises(
    errors.ConfigError, match=f'evaluation.num_samples={count}'
  ):
    generator_stage.SampleDistance(
      task,
      tokenizer,
      inference.Sampling(num_steps=3),
      network,
      [],
      num_samples=count,
      batch_size=5,
      class_names=NAMES,
    )


@pytest.mark.slow
def test_the_distance_is_that_of_samples_of_the_running_means(parts):
  task, tokenizer, network, images, evaluator = parts
  state = _task_state(task, 0)
  ((name, value),) = evaluator.run(state)
  assert name == 'fd_hog'
  generator = inference.ImageGenerator(
    task.model,
    state.ema['generator'],
    state.stats['latents'],
    tokenizer,
    sampling=inference.Sampling(num_steps=3),
  )
  labels = evaluate.balanced_labels(COUNT, len(NAMES))
  features = evaluate.image_features(network)
  sampled = frechet.fit([np.asarray(features(generator.sample_uint8(labels)))])
  # The masked row is none of the images.
  real = frechet.fit([np.asarray(features(images[:7]))])
  wanted = frechet.frechet_distance(sampled, real)
  np.testing.assert_allclose(value, wanted, rtol=1e-4)


def test_another_state_is_another_distance_and_the_same_one_the_same(parts):
  task, *_, evaluator = parts
  one, other = _task_state(task, 0), _task_state(task, 1)
  values = [dict(evaluator.run(s))['fd_hog'] for s in (one, other, one)]
  assert values[0] == values[2] != values[1]
