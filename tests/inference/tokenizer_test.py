import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, inference
from selfboottok_jax.inference import tokenizer as inference_tokenizer
from selfboottok_jax.training import checkpointing
from tests import tiny

# Sizes of the models in tests/launch/tiny.py.
SIZE, CODE, STEPS = 16, (4, 8), 2


@pytest.fixture(scope='module')
def pictures():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)


def test_what_was_trained_is_what_is_loaded(runs, tokenizer):
  run = checkpointing.read_run(str(runs / 'tokenizer'), what='test')
  assert tokenizer.step == run.step == STEPS
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
def test_images_that_cannot_be_encoded(unchecked, tokenizer, images, message):
  with pytest.raises(errors.UserError, match=message):
    unchecked(tokenizer.encode, images)


@pytest.mark.parametrize(
  ('codes', 'options', 'message'),
  [
    (np.zeros(CODE), {}, r'codes of shape \(4, 8\); wanted \[b, 4, 8\]'),
    (np.zeros((1, 5, 8)), {}, 'codes of shape'),
    (np.zeros((1, *CODE)), {'num_groups': 0}, 'num_groups=0; wanted 1 to 3'),
    (np.zeros((1, *CODE)), {'num_groups': 4}, 'num_groups=4; wanted 1 to 3'),
  ],
)
def test_codes_that_cannot_be_decoded(
  unchecked, tokenizer, codes, options, message
):
  with pytest.raises(errors.UserError, match=message):
    unchecked(tokenizer.decode, codes.astype(np.float32), **options)


def test_how_codes_are_used_is_part_of_the_fingerprint(tokenizer):
  seen = {tokenizer.fingerprint}
  for change in (
    {'tau': 0.1},
    {'unit_rms': False},
    {'bootstrap_from': 'quantized'},
  ):
    model = tokenizer.model.clone(**change)
    seen.add(inference_tokenizer.fingerprint(model, tokenizer.params))
  assert len(seen) == 4
  # The decoding side may differ.
  model = tokenizer.model.clone(cross_attend='all', local2d_depth=3)
  assert inference_tokenizer.fingerprint(model, tokenizer.params) in seen


@pytest.mark.parametrize('kind', ['missing', 'empty'])
def test_a_workdir_that_is_no_run(tmp_path, kind):
  workdir = tmp_path if kind == 'empty' else tmp_path / 'missing'
  with pytest.raises(errors.CheckpointError, match='is no run'):
    inference.load_tokenizer(str(workdir))


def test_a_run_of_another_task_is_refused(runs):
  with pytest.raises(errors.CheckpointError, match="run of task 'generator'"):
    inference.load_tokenizer(runs / 'generator')


@pytest.fixture(scope='module')
def small():
  """The tiny model with parameters that no part of it ignores."""
  model = tiny.make_tokenizer()
  params = tiny.noise_for(model.init, jax.random.key(0), tiny.images(1))
  return inference.ImageTokenizer(model, params['params'])


@pytest.fixture(
  params=['encode', pytest.param('decode', marks=pytest.mark.slow)]
)
def call(request, small):
  """A method of a tokenizer, and two inputs for it."""
  images = tiny.images(2)
  if request.param == 'encode':
    return small.encode, images
  return small.decode, small.encode(images)


def test_methods_can_be_jitted(call):
  method, given = call
  np.testing.assert_allclose(jax.jit(method)(given), method(given), atol=1e-5)


def test_methods_can_be_mapped(call):
  method, given = call
  stacked = jnp.stack([given, given[::-1]])
  expected = [method(one) for one in stacked]
  np.testing.assert_allclose(jax.vmap(method)(stacked), expected, atol=1e-5)


def test_methods_can_be_differentiated(call):
  method, given = call

  # Tokens are normalised, so the gradient of their squares would be rounding.
  weights = jax.random.normal(jax.random.key(1), method(given).shape)

  def loss(x):
    return jnp.sum(method(x) * weights)

  gradient = jax.grad(loss)(given)
  assert np.isfinite(gradient).all()
  assert np.any(gradient)
  scale = float(np.abs(gradient).max())
  np.testing.assert_allclose(
    jax.jit(jax.grad(loss))(given), gradient, atol=1e-4 * scale
  )


def test_methods_can_be_exported(call):
  method, given = call
  shape = jax.ShapeDtypeStruct(given.shape, given.dtype)
  exported = jax.export.export(jax.jit(method))(shape)
  np.testing.assert_allclose(exported.call(given), method(given), atol=1e-5)
