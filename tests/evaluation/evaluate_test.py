import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import inference, pretrained
from selfboottok_jax.evaluation import evaluate, evaluators
from selfboottok_jax.models import sit
from selfboottok_jax.training import sharding
from tests import tiny

SIZE, CLASSES, BATCH = tiny.TOKENIZER['image_size'], 3, 8
SAMPLING = {
  'sampler': 'ode',
  'num_steps': 2,
  'guidance_scale': 1.5,
  'guidance_interval': (0.0, 0.85),
}


@pytest.fixture(scope='module')
def batches():
  images = np.random.default_rng(0).integers(
    0, 256, (2 * BATCH, SIZE, SIZE, 3), np.uint8
  )
  mask = np.arange(2 * BATCH) < 12
  return [
    {'image': images[s], 'label': np.zeros(BATCH, np.int32), 'mask': mask[s]}
    for s in (slice(BATCH), slice(BATCH, 2 * BATCH))
  ]


@pytest.fixture(scope='module')
def tokenizer():
  model = tiny.make_tokenizer()
  params = jax.jit(model.init)(jax.random.key(0), tiny.images(1))['params']
  return inference.ImageTokenizer(model, tiny.awake(params), step=7)


@pytest.fixture(scope='module')
def generator(tokenizer):
  model = sit.SiT(
    num_tokens=tokenizer.num_tokens,
    token_dim=tokenizer.token_dim,
    num_classes=CLASSES,
    width=16,
    depth=1,
    heads=2,
  )
  codes = jnp.zeros((1, tokenizer.num_tokens, tokenizer.token_dim))
  params = jax.jit(model.init)(
    jax.random.key(0), codes, jnp.zeros(1), jnp.zeros(1, jnp.int32)
  )['params']
  latents = {name: jnp.ones(tokenizer.token_dim) for name in ('mean', 'std')}
  sampling = {k: v for k, v in SAMPLING.items() if k != 'guidance_interval'}
  sampling |= {'guidance_low': 0.0, 'guidance_high': 0.85}
  return inference.ImageGenerator(
    model,
    tiny.awake(params),
    latents,
    tokenizer,
    class_names=('a', 'b', 'c'),
    config={'sampling': sampling},
  )


def test_a_tokenizer_gets_a_score_with_a_protocol_for_each_metric(
  tokenizer, batches
):
  perceptual = pretrained.load_perceptual('hog', patch_size=4)
  result = evaluate.evaluate_tokenizer(
    'RUN',
    tokenizer,
    batches,
    sharding.make_mesh(),
    reference='12 pictures',
    perceptual=perceptual,
  )
  by_metric = {score.metric: score for score in result}
  measured = dict(
    evaluators.Reconstruction(
      tokenizer.model, batches, sharding.make_mesh()
    ).run_params(tokenizer.params)
  )
  distance = f'distance ({perceptual.name})'
  assert set(by_metric) == {*measured, distance}
  for name, value in measured.items():
    assert by_metric[name].value == pytest.approx(value)
  for score in result:
    assert score.run == 'RUN'
    assert '12 pictures' in score.protocol
    assert 'step 7' in score.protocol
    assert evaluate.weights_hash(tokenizer.params) in score.protocol
    assert jax.default_backend() in score.protocol
  assert by_metric['psnr'].higher_is_better is True
  assert by_metric[distance].higher_is_better is False
  assert by_metric['psnr_mean_image'].higher_is_better is None
  # Baselines are told apart from what they are compared with.
  assert 'baseline' in by_metric['psnr_mean_image'].protocol
  assert 'baseline' not in by_metric['psnr'].protocol
  assert by_metric[distance].value > 0


def test_image_features_are_one_vector_per_image(batches):
  network = pretrained.load_network('hog', patch_size=4)
  features = evaluate.image_features(network)(jnp.asarray(batches[0]['image']))
  images = jnp.asarray(batches[0]['image'] / 127.5 - 1.0)
  seen = network(network.params, images)
  assert features.shape == (BATCH, network.dim)
  np.testing.assert_allclose(features, np.mean(seen.patches, axis=1), atol=1e-4)


def test_samples_do_not_depend_on_the_batch_size(generator):
  wide, narrow = (
    np.concatenate(
      list(evaluate.sample_batches(generator, 7, size, seed=3, **SAMPLING))
    )
    for size in (7, 4)
  )
  assert wide.dtype == np.uint8
  assert wide.shape == (7, SIZE, SIZE, 3)
  # Other kernels may round a pixel the other way.
  assert np.abs(wide.astype(int) - narrow).max() <= 1
  labels = np.array([2, 2, 2, 2, 2, 2, 2], np.int32)
  others = np.concatenate(
    list(
      evaluate.sample_batches(
        generator, 7, 7, seed=3, labels=labels, **SAMPLING
      )
    )
  )
  distance = np.abs(others.astype(int) - wide).max(axis=(1, 2, 3))
  balanced = evaluate.balanced_labels(7, CLASSES)
  np.testing.assert_array_equal(balanced, [0, 1, 2, 0, 1, 2, 0])
  np.testing.assert_array_equal(distance > 1, balanced != 2)


def test_a_generator_is_scored_beside_gaussian_codes(generator, batches):
  result = evaluate.evaluate_generator(
    'GEN',
    generator,
    batches,
    pretrained.load_network('random', patch_size=4, dim=4),
    num_samples=12,
    batch_size=6,
    reference='12 pictures',
    sampling=evaluate.sampling_of(generator),
  )
  own, baseline = result
  assert baseline.metric == f'{own.metric}, Gaussian codes'
  assert 'baseline' in baseline.protocol
  for score in result:
    assert np.isfinite(score.value)
    assert score.value > 0
    assert '12 samples' in score.protocol
    assert 'num_steps 2' in score.protocol
  assert own.value != baseline.value


def test_sampling_settings_are_those_of_the_config(generator):
  assert evaluate.sampling_of(generator) == SAMPLING


def test_weights_hash_tells_weights_apart(tokenizer):
  assert evaluate.weights_hash({}) == 'none'
  one = evaluate.weights_hash(tokenizer.params)
  assert one == evaluate.weights_hash(jax.tree.map(jnp.copy, tokenizer.params))
  assert one != evaluate.weights_hash(tiny.awake(tokenizer.params))
