import jax
import numpy as np
import pytest

from selfboottok_jax import inference, pretrained
from selfboottok_jax.evaluation import evaluate, frechet, sample_distance
from selfboottok_jax.training import state as state_lib
from tests import tiny
from tests.tasks import generators

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
  evaluator = sample_distance.SampleDistance(
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


def _state(task, seed):
  params, stats = jax.jit(task.init)(jax.random.key(seed))
  params = {'generator': tiny.awake(params['generator'])}
  return state_lib.TrainState(
    step=np.int32(0), params=params, ema=params, opt={}, stats=stats
  )


def test_the_distance_is_that_of_samples_of_the_running_means(parts):
  task, tokenizer, network, images, evaluator = parts
  state = _state(task, 0)
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
  one, other = _state(task, 0), _state(task, 1)
  values = [dict(evaluator.run(s))['fd_hog'] for s in (one, other, one)]
  assert values[0] == values[2] != values[1]
