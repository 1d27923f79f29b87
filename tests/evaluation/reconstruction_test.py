import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import pixels
from selfboottok_jax.evaluation import reconstruction, scores
from selfboottok_jax.training import sharding
from selfboottok_jax.training import state as state_lib
from tests import tiny

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


class Recorder:
  """An observer that keeps what it sees."""

  def begin(self):
    self.seen = []

  def add(self, seen):
    self.seen.append(seen)

  def finish(self):
    yield 'batches', float(len(self.seen))


@pytest.fixture(scope='module')
def recorder():
  return Recorder()


@pytest.fixture(scope='module')
def evaluator(batches, recorder):
  return reconstruction.Reconstruction(
    tiny.make_tokenizer(),
    batches,
    sharding.make_mesh(),
    leave_out=True,
    observers=[recorder],
  )


@pytest.fixture(scope='module')
def measured(evaluator, params):
  """All measures of a state whose means are `params`."""
  other = jax.tree.map(jnp.zeros_like, params)
  state = state_lib.TrainState(
    jnp.int32(0), {'tokenizer': other}, {'tokenizer': params}, {}, {}
  )
  return dict(evaluator.run(state))


@pytest.fixture(scope='module')
def images(batches):
  """All 16, the last three of which are padding."""
  return np.concatenate([b['image'] for b in batches])


@pytest.fixture(scope='module')
def quantized(params, images):
  """Quantised tokens of the images, by group."""
  tokenize = jax.jit(functools.partial(_apply, method='tokenize'))
  return tokenize(params, jnp.asarray(pixels.to_float(images)))[2]


@pytest.fixture(scope='module')
def render(params):
  """Turns quantised tokens into images."""
  apply = jax.jit(functools.partial(_apply, method='render'))
  return lambda codes: pixels.to_uint8(apply(params, codes), 'round')


def _apply(params, x, method):
  return tiny.make_tokenizer().apply({'params': params}, x, method=method)


def test_reconstruction_scores_the_means_without_the_padding(
  measured, evaluator, params, images, quantized, render
):
  made = render({group: q.codes for group, q in quantized.items()})[:13]
  images = images[:13]
  mean = np.round(images.mean(axis=0, dtype=np.float64)).astype(np.uint8)
  expected = scores.image_scores(jnp.asarray(images), made)
  expected |= scores.baseline_scores(jnp.asarray(images), jnp.asarray(mean))
  for name, values in expected.items():
    np.testing.assert_allclose(
      measured[name], np.mean(values), rtol=1e-3, err_msg=name
    )
  size = tiny.TOKENIZER['codebook_size']
  for group, q in quantized.items():
    used = [
      len(np.unique(q.indices[:13, i])) / size
      for i in range(tiny.TOKENIZER['num_codebooks'])
    ]
    np.testing.assert_allclose(
      measured[f'codes_used_{group}'], np.mean(used), rtol=1e-6
    )
    assert 1 <= measured[f'perplexity_{group}'] <= size
  # The same parameters again, without a state.
  assert dict(evaluator.run_params(params)) == measured


def test_groups_that_are_left_out_are_means_of_the_first_batch(
  measured, images, quantized, render
):
  codes = {group: q.codes for group, q in quantized.items()}
  for name, groups in {
    'psnr': (),
    'psnr_without_local1d': ('local1d',),
    'psnr_without_local2d': ('local2d',),
    'psnr_global_only': ('local1d', 'local2d'),
  }.items():
    # The first batch is whole.
    means = {
      group: jnp.broadcast_to(codes[group][:8].mean(axis=0), (16, 8, 4))
      for group in groups
    }
    expected = np.mean(scores.psnr(images, render(codes | means))[:13])
    np.testing.assert_allclose(
      measured[name], expected, rtol=1e-4, err_msg=name
    )
  assert len({round(measured[n], 4) for n in measured if 'psnr_' in n}) == 5


def test_observers_see_each_batch_once(measured, recorder, batches):
  assert measured['batches'] == len(recorder.seen) == 2
  shown = recorder.seen[0].shown
  assert len(shown) == len(reconstruction.ROWS)
  np.testing.assert_array_equal(shown[0], batches[0]['image'])
  np.testing.assert_array_equal(shown[1], recorder.seen[0].reconstruction)
  np.testing.assert_array_equal(recorder.seen[1].mask, batches[1]['mask'])


@pytest.mark.parametrize(
  ('count', 'expected'), [(4, range(4)), (8, range(8)), (20, range(0, 16, 2))]
)
def test_what_is_shown_is_spread_over_a_batch(count, expected):
  rows = np.arange(count)[reconstruction.shown_rows(count)]
  np.testing.assert_array_equal(rows, expected)


def test_what_is_left_out_of_fewer_groups():
  assert not reconstruction.variants(['global'])
  assert reconstruction.variants(['global', 'local2d']) == {
    'psnr_without_local2d': ('local2d',),
    'psnr_global_only': ('local2d',),
  }
