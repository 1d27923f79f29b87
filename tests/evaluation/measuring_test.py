import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import inference, pixels
from selfboottok_jax.evaluation import (
  codes,
  measuring,
  metrics,
  references,
  scores,
)
from selfboottok_jax.training import sharding
from tests import tiny

SIZE = tiny.TOKENIZER['image_size']


def _batches(images, originals=None, batch_size=8):
  """Batches with padding at the end."""
  count = len(images)
  rows = np.pad(np.arange(count), (0, -count % batch_size))
  mask = np.arange(len(rows)) < count
  for first in range(0, len(rows), batch_size):
    part = slice(first, first + batch_size)
    batch = {'image': images[rows[part]], 'mask': mask[part]}
    if originals is not None:
      batch['original'] = originals[rows[part]]
    yield batch


@pytest.fixture(scope='module')
def made():
  return tiny.levels(11, seed=1)


def _opener(path, images):
  """What opens some images as a reference."""
  np.savez(path, arr_0=images)
  return lambda wanted: references.of_npz(
    path, wanted, image_size=SIZE, cache=path.parent
  )


def test_originals_are_the_reference_of_what_has_no_other(tmp_path, made):
  real, other = tiny.levels(11, seed=2), tiny.levels(9, seed=3)
  openers = {
    'originals': _opener(tmp_path / 'real.npz', real),
    'reference': _opener(tmp_path / 'other.npz', other),
  }
  mesh = sharding.make_mesh(fsdp=1)
  plan = metrics.parse(['psnr', 'fd_hog'])

  def measure(**openers):
    measurement = measuring.Measuring(plan, mesh, openers, image_size=SIZE)
    for batch in _batches(made, real):
      measurement.add(batch)
    return measurement, {m: (v, p) for m, v, p in measurement.finish()}

  _, own = measure(originals=openers['originals'])
  measurement, both = measure(**openers)
  assert own['psnr'] == both['psnr']
  expected = np.mean(np.asarray(scores.psnr(real, made), np.float64))
  np.testing.assert_allclose(own['psnr'][0], expected, rtol=1e-6)
  assert own['fd_hog'][1]['reference'].endswith('real.npz')
  assert both['fd_hog'][1]['reference'].endswith('other.npz')
  assert own['fd_hog'][0] != both['fd_hog'][0]
  # Other images, with the same references.
  measurement.start()
  for batch in _batches(other, other):
    measurement.add(batch)
  again = {m: v for m, v, _ in measurement.finish()}
  assert again['psnr'] == scores.PSNR_CAP
  np.testing.assert_allclose(again['fd_hog'], 0, atol=1e-9)


@pytest.mark.parametrize(
  'devices', [8, pytest.param(1, marks=pytest.mark.slow)]
)
def test_reconstructions_on_any_devices(devices, made):
  model = tiny.make_tokenizer()
  params = tiny.awake(
    tiny.noise_for(model.init, jax.random.key(0), tiny.images(1))['params']
  )
  mesh = sharding.make_mesh(fsdp=1, devices=jax.devices()[:devices])
  reconstruct = measuring.Reconstructing(
    inference.ImageTokenizer(model, params), mesh, with_codes=True
  )
  counted, found = codes.CodeStatistics(['usage']), []
  for batch in _batches(made):
    placed, of_all = reconstruct(batch)
    np.testing.assert_array_equal(placed['original'], batch['image'])
    counted.add(**of_all)
    found.append(reconstruct.gather(placed))
  output = jax.jit(model.apply)(
    {'params': params}, pixels.to_float(jnp.asarray(made))
  )
  expected = pixels.to_uint8(output.reconstruction, 'round')
  apart = np.concatenate(found).astype(int) - np.asarray(expected)
  # Kernels of another size round in another way.
  assert np.abs(apart).max() <= 1
  assert np.mean(apart != 0) < 1e-3
  usage = {name: value for name, value, _ in counted.finish()}
  for group, quantized in output.quantized.items():
    chosen = np.asarray(quantized.indices)
    shares = [
      len(np.unique(chosen[:, i])) / model.codebook_size
      for i in range(model.num_codebooks)
    ]
    np.testing.assert_allclose(usage[f'usage_{group}'], np.mean(shares))


def test_random_weights_are_told(tmp_path, made):
  plan = metrics.parse(['psnr', 'distance_random', 'fd_random', 'fd_hog'])
  measurement = measuring.Measuring(
    plan,
    sharding.make_mesh(fsdp=1),
    {'originals': _opener(tmp_path / 'real.npz', made)},
    image_size=SIZE,
  )
  for batch in _batches(made, made):
    measurement.add(batch)
  warned = {
    metric: 'random weights' in protocol.get('warning', '')
    for metric, _, protocol in measurement.finish()
  }
  assert warned == {
    'psnr': False,
    'distance_random': True,
    'fd_random': True,
    'fd_hog': False,
  }
