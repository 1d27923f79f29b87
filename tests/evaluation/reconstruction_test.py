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


def _state(params, ema, stats):
  return state_lib.TrainState(jnp.int32(0), params, ema, {}, stats)


def test_reconstruction_scores_the_means_without_the_padding(batches, params):
  model = tiny.make_tokenizer()
  evaluator = reconstruction.Reconstruction(
    model, batches, sharding.make_mesh()
  )
  other = jax.tree.map(jnp.zeros_like, params)
  state = _state({'tokenizer': other}, {'tokenizer': params}, {})
  measured = dict(evaluator.run(state))
  images = np.concatenate([b['image'] for b in batches])[:13]
  output = jax.jit(model.apply)({'params': params}, images / 127.5 - 1.0)
  made = pixels.to_uint8(output.reconstruction, 'round')
  mean = np.round(images.mean(axis=0, dtype=np.float64)).astype(np.uint8)
  expected = scores.image_scores(jnp.asarray(images), made)
  expected |= scores.baseline_scores(jnp.asarray(images), jnp.asarray(mean))
  for name, values in expected.items():
    np.testing.assert_allclose(
      measured[name], np.mean(values), rtol=1e-3, err_msg=name
    )
  for group, quantized in output.quantized.items():
    used = [
      len(np.unique(quantized.indices[:, i])) / model.codebook_size
      for i in range(model.num_codebooks)
    ]
    np.testing.assert_allclose(
      measured[f'codes_used_{group}'], np.mean(used), rtol=1e-6
    )
    assert 1 <= measured[f'perplexity_{group}'] <= model.codebook_size
  # The same parameters again, without a state.
  assert dict(evaluator.run_params(params)) == measured


class Recorder:
  """An observer that keeps what it sees."""

  def begin(self):
    self.seen = []

  def add(self, seen):
    self.seen.append(seen)

  def finish(self):
    yield 'batches', float(len(self.seen))


def test_groups_that_are_left_out_are_means_of_the_first_batch(batches, params):
  model, recorder = tiny.make_tokenizer(), Recorder()
  evaluator = reconstruction.Reconstruction(
    model, batches, sharding.make_mesh(), leave_out=True, observers=[recorder]
  )
  measured = dict(evaluator.run_params(params))
  assert measured['batches'] == len(recorder.seen) == 2
  images = np.concatenate([b['image'] for b in batches])
  model = {
    name: jax.jit(
      functools.partial(model.apply, {'params': params}, method=name)
    )
    for name in ('tokenize', 'render')
  }
  quantized = model['tokenize'](jnp.asarray(pixels.to_float(images)))[2]
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
    made = pixels.to_uint8(model['render'](codes | means), 'round')
    expected = np.mean(scores.psnr(images, made)[:13])
    np.testing.assert_allclose(
      measured[name], expected, rtol=1e-4, err_msg=name
    )
  assert len({round(measured[n], 4) for n in measured if 'psnr_' in n}) == 5
  shown = recorder.seen[0].shown
  assert len(shown) == len(reconstruction.ROWS)
  np.testing.assert_array_equal(shown[0], batches[0]['image'])
  np.testing.assert_array_equal(shown[1], recorder.seen[0].reconstruction)


def test_what_is_left_out_of_fewer_groups():
  assert not reconstruction.variants(['global'])
  assert reconstruction.variants(['global', 'local2d']) == {
    'psnr_without_local2d': ('local2d',),
    'psnr_global_only': ('local2d',),
  }
