import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfboottok_jax
from selfboottok_jax import errors, inference
from selfboottok_jax.training import checkpointing
from tests import runs, tiny

SIZE = tiny.TOKENIZER['image_size']
CODE = (tiny.TOKENIZER['num_tokens'], tiny.TOKENIZER['token_dim'])
LABELS = [0, 3, 1, 9]
SAMPLING = {'num_steps': 3}


@pytest.fixture(scope='module')
def workdirs(tmp_path_factory):
  return runs.train_all(tmp_path_factory.mktemp('runs'))


@pytest.fixture(scope='module')
def tokenizer(workdirs):
  return selfboottok_jax.load_tokenizer(workdirs['tokenizer'])


@pytest.fixture(scope='module')
def generator(workdirs, tokenizer):
  loaded = selfboottok_jax.load_generator(
    workdirs['generator'], tokenizer=tokenizer
  )
  # Two updates teach nothing; awake, the label and the noise count.
  loaded.params = tiny.awake(loaded.params)
  return loaded


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)


def test_what_was_trained_is_what_is_loaded(workdirs, tokenizer):
  run = checkpointing.read_run(str(workdirs['tokenizer']), what='test')
  assert tokenizer.step == run.step == runs.STEPS
  assert tokenizer.config['model']['token_dim'] == CODE[1]
  assert (tokenizer.num_tokens, tokenizer.token_dim) == CODE
  for name, module in tokenizer.params.items():
    tiny.assert_same(module, run.ema['tokenizer'][name])
  assert not any(name.startswith('project_') for name in tokenizer.params)


def test_encode_takes_uint8_and_float(tokenizer, pictures):
  codes = tokenizer.encode(pictures)
  assert codes.shape == (4, *CODE)
  assert codes.dtype == jnp.float32
  scaled = pictures / 127.5 - 1
  for images in (scaled, scaled.astype(np.float32), jnp.asarray(pictures)):
    np.testing.assert_allclose(tokenizer.encode(images), codes, atol=1e-4)


def test_decode_gives_images(tokenizer, pictures):
  codes = np.asarray(tokenizer.encode(pictures))
  images = tokenizer.decode(codes)
  assert images.shape == pictures.shape
  assert images.dtype == jnp.float32
  assert np.abs(images).max() <= 1
  # Far out the decoder overshoots, and is clipped.
  awake = inference.ImageTokenizer(
    tokenizer.model, tiny.awake(tokenizer.params, 2.0)
  )
  np.testing.assert_allclose(np.abs(awake.decode(codes)).max(), 1.0)
  assert tokenizer.decode(codes, num_groups=1).shape == pictures.shape


def _as_users_call(method, *args, **kwargs):
  """Without the checks of types and shapes that only tests have."""
  return inspect.unwrap(method.__func__)(method.__self__, *args, **kwargs)


@pytest.mark.parametrize(
  ('images', 'message'),
  [
    (np.zeros((SIZE, SIZE, 3), np.uint8), r'shape \(16, 16, 3\); wanted \[b'),
    (np.zeros((1, SIZE, 8, 3), np.uint8), 'crop and resize'),
    (np.zeros((1, SIZE, SIZE, 1), np.uint8), 'shape'),
    (np.zeros((1, SIZE, SIZE, 3), np.int32), 'type int32; wanted uint8'),
    (np.full((1, SIZE, SIZE, 3), 255.0), r'to 255; wanted \[-1, 1\]'),
    (np.full((1, SIZE, SIZE, 3), -1.1), r'from -1.1 to'),
  ],
)
def test_images_that_cannot_be_encoded(tokenizer, images, message):
  with pytest.raises(errors.UserError, match=message):
    _as_users_call(tokenizer.encode, images)


@pytest.mark.parametrize(
  ('codes', 'options', 'message'),
  [
    (np.zeros(CODE), {}, r'codes of shape \(8, 4\); wanted \[b, 8, 4\]'),
    (np.zeros((1, 9, 4)), {}, 'codes of shape'),
    (np.zeros((1, *CODE)), {'num_groups': 0}, 'num_groups=0; wanted 1 to 3'),
    (np.zeros((1, *CODE)), {'num_groups': 4}, 'num_groups=4; wanted 1 to 3'),
  ],
)
def test_codes_that_cannot_be_decoded(tokenizer, codes, options, message):
  with pytest.raises(errors.UserError, match=message):
    _as_users_call(tokenizer.decode, codes.astype(np.float32), **options)


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
def test_labels_that_cannot_be_sampled(generator, labels, message):
  with pytest.raises(errors.UserError, match=message):
    _as_users_call(generator.sample, labels, **SAMPLING)


def test_a_scaled_tokenizer_decodes_for_the_generator(workdirs, tokenizer):
  scaled = inference.load_tokenizer(workdirs['scaled'])
  assert scaled.fingerprint == tokenizer.fingerprint
  assert scaled.model.local2d_width != tokenizer.model.local2d_width
  loaded = inference.load_generator(workdirs['generator'], tokenizer=scaled)
  assert loaded.step == runs.STEPS
  for name in ('encoder', 'quantizer_global', 'decoder'):
    tiny.assert_same(scaled.params[name], tokenizer.params[name])


def test_another_tokenizer_is_refused(workdirs, tokenizer):
  encoder = tiny.awake(tokenizer.params['encoder'])
  other = inference.ImageTokenizer(
    tokenizer.model, tokenizer.params | {'encoder': encoder}
  )
  with pytest.raises(errors.CheckpointError, match='another tokenizer'):
    inference.load_generator(workdirs['generator'], tokenizer=other)


def test_how_codes_are_used_is_part_of_the_fingerprint(tokenizer):
  seen = {tokenizer.fingerprint}
  for change in (
    {'tau': 0.1},
    {'unit_rms': False},
    {'bootstrap_from': 'quantized'},
  ):
    model = tokenizer.model.clone(**change)
    seen.add(inference.fingerprint(model, tokenizer.params))
  assert len(seen) == 4
  # The decoding side may differ.
  model = tokenizer.model.clone(cross_attend='all', local2d_depth=3)
  assert inference.fingerprint(model, tokenizer.params) in seen


def test_latents_are_of_the_stored_statistics(workdirs, tokenizer):
  run = checkpointing.read_run(str(workdirs['generator']), what='test')
  latents = run.stats['latents']
  assert latents['mean'].shape == latents['std'].shape == (CODE[1],)
  assert np.all(latents['std'] > 0)
  assert tiny.changed(latents['std'], jnp.ones(CODE[1]))


@pytest.mark.parametrize('kind', ['missing', 'empty'])
def test_a_workdir_that_is_no_run(tmp_path, tokenizer, kind):
  workdir = tmp_path if kind == 'empty' else tmp_path / 'missing'
  with pytest.raises(errors.CheckpointError, match='is no run'):
    inference.load_tokenizer(str(workdir))
  with pytest.raises(errors.CheckpointError, match='is no run'):
    inference.load_generator(str(workdir), tokenizer=tokenizer)


def test_runs_of_another_task_are_refused(workdirs, tokenizer):
  with pytest.raises(errors.CheckpointError, match="run of task 'generator'"):
    inference.load_tokenizer(workdirs['generator'])
  with pytest.raises(errors.CheckpointError, match="run of task 'tokenizer'"):
    inference.load_generator(workdirs['tokenizer'], tokenizer=tokenizer)


def test_a_scaled_run_can_be_fine_tuned(workdirs, tmp_path):
  config = runs.scaling_config(workdirs['tokenizer'])
  config.init_from = str(workdirs['scaled'])
  state = runs.train(config, tmp_path / 'tuned')
  stage2 = checkpointing.read_run(str(workdirs['scaled']), what='test')
  tiny.assert_same(jax.device_get(state.params['base']), stage2.params['base'])
