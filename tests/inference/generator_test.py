import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, inference
from selfboottok_jax.training import checkpointing
from tests import tiny

LABELS = [0, 3, 1, 9]
SAMPLING = {'num_steps': 3}
# Of tests/launch/tiny.py.
SIZE, TOKEN_DIM, STEPS = 16, 8, 2


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
    'guidance_interval': (0.0, 0.85),
  }
  return np.asarray(generator.sample_codes(labels, **settings | options))


def test_a_sample_is_a_function_of_seed_label_and_index(generator):
  every = _codes(generator, LABELS)

  def assert_same(codes, expected):
    # Kernels of other batch sizes sum in another order.
    np.testing.assert_allclose(codes, expected, atol=1e-5)

  assert_same(_codes(generator, LABELS[:2]), every[:2])
  assert_same(_codes(generator, LABELS[2:], first_index=2), every[2:])
  # Alone too, where it is padded.
  assert_same(_codes(generator, LABELS[3:], first_index=3), every[3:])
  relabelled = _codes(generator, [5, *LABELS[1:]])
  assert_same(relabelled[1:], every[1:])
  for other in (
    relabelled[:1] - every[:1],
    _codes(generator, LABELS, seed=1) - every,
    _codes(generator, LABELS, first_index=4) - every,
  ):
    assert np.abs(other).max(axis=(1, 2)).min() > 1e-3


def test_the_seed_changes_the_images(generator):
  first, second = (
    np.asarray(generator.sample(LABELS, seed=seed, **SAMPLING))
    for seed in (0, 1)
  )
  assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 1e-4


def test_a_scale_of_one_is_the_conditional_model(generator):
  guided = {'guidance_interval': (0.0, 1.0)}
  plain = _codes(generator, LABELS, guidance_scale=1.0, **guided)
  # With an interval that no step falls into, nothing is guided either.
  never = _codes(generator, LABELS, guidance_interval=(0.0, 0.0))
  np.testing.assert_allclose(plain, never, atol=1e-5)
  # A hair from 1 the doubled batch is evaluated, to the same effect.
  near = _codes(generator, LABELS, guidance_scale=1 + 1e-6, **guided)
  np.testing.assert_allclose(near, plain, atol=1e-4)
  assert np.abs(_codes(generator, LABELS, **guided) - plain).max() > 1e-3


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
