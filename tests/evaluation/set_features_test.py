import dataclasses
import hashlib

import jax
import numpy as np
import pytest

from selfboottok_jax import errors, pixels, pretrained
from selfboottok_jax.evaluation import set_features
from selfboottok_jax.pretrained import inception
from selfboottok_jax.training import sharding
from tests.evaluation import sets

KEY = 'colours/pool'


def _wanted(devices=8):
  networks = set_features.as_networks([sets.Colours()])
  return set_features.Wanted(networks, (KEY,), (KEY,), sets.mesh(devices))


def _collect(batches, devices=8, **arguments):
  collected = set_features.SetFeatures(_wanted(devices), **arguments)
  for batch in batches:
    collected.add(batch)
  collected.finish()
  return collected


@pytest.mark.parametrize(('size', 'devices'), [(7, 8), (16, 1), (601, 8)])
def test_batches_and_devices_change_nothing(monkeypatch, size, devices):
  """Moments and rows are those of numpy; padding counts for nothing."""
  monkeypatch.setattr(set_features, '_CHUNK', 100)
  pictures = sets.images(601)
  collected = _collect(sets.batches(pictures, size), devices)
  wanted = sets.pool(pictures)
  assert collected.count == 601
  assert collected.image_size == (8, 8)
  # float32 means of 16 numbers below 1.
  np.testing.assert_allclose(collected.features(KEY), wanted, atol=4e-7)
  fit = collected.gaussian(KEY)
  assert fit.count == 601
  np.testing.assert_allclose(fit.mean, wanted.mean(axis=0), atol=1e-7)
  np.testing.assert_allclose(
    fit.covariance, np.cov(wanted, rowvar=False), atol=1e-7
  )


def test_arrays_on_the_mesh_are_taken_as_they_are():
  mesh = sets.mesh()
  (batch,) = sets.batches(sets.images(13), 16)
  placed = sharding.put_batch(batch, mesh)
  np.testing.assert_array_equal(
    _collect([placed]).features(KEY), _collect([batch]).features(KEY)
  )


def test_rows_are_kept_evenly():
  pictures = sets.images(20)
  collected = _collect(sets.batches(pictures, 8), most_kept=5, of=20)
  whole = _collect(sets.batches(pictures, 8)).features(KEY)
  np.testing.assert_array_equal(collected.features(KEY), whole[3::4])
  assert collected.gaussian(KEY).count == 20


def test_more_may_be_added_after_the_end():
  first, second = sets.batches(sets.images(20), 10)
  collected = _collect([first])
  assert len(collected.features(KEY)) == 10
  collected.add(second)
  collected.finish()
  whole = _collect([first, second])
  np.testing.assert_array_equal(collected.features(KEY), whole.features(KEY))
  np.testing.assert_allclose(
    collected.gaussian(KEY).mean, whole.gaussian(KEY).mean, rtol=1e-12
  )


def test_errors():
  with pytest.raises(errors.DataError, match=r'\(4, 4\) pixels after .*8, 8'):
    _collect(
      sets.batches(sets.images(8), 8) + sets.batches(sets.images(8, size=4), 8)
    )
  networks = set_features.as_networks([sets.Colours(gain=float('nan'))])
  wanted = dataclasses.replace(_wanted(), networks=networks, moments=())
  collected = set_features.SetFeatures(wanted)
  collected.add(sets.batches(sets.images(8), 8)[0])
  with pytest.raises(errors.DataError, match='not finite'):
    collected.finish()
  (batch,) = sets.batches(sets.images(8), 8)
  with pytest.raises(errors.DataError, match='type float32 to score'):
    _collect([batch | {'image': batch['image'].astype(np.float32)}])
  with pytest.raises(errors.DataError, match='no images'):
    _collect([]).features(KEY)
  with pytest.raises(errors.ConfigError, match='colours, colours'):
    set_features.as_networks([sets.Colours(), sets.Colours()])
  with pytest.raises(errors.ConfigError, match='none to compare'):
    set_features.as_networks([])
  with pytest.raises(errors.ConfigError, match='convention'):
    set_features.load('hog', 'adm2')


@dataclasses.dataclass(frozen=True, eq=False)
class Small(inception.Inception):
  """Reads a file of one number."""

  def init(self, key):
    return {'x': jax.numpy.zeros(1)}

  def read(self, arrays, source):
    return dict(arrays)


def test_fid_is_of_the_published_file_alone(tmp_path, monkeypatch):
  recipe = pretrained.Recipe(Small, {'resize': str})
  monkeypatch.setitem(pretrained.NETWORKS, 'inception', recipe)
  path = tmp_path / 'a.npz'
  np.savez(path, x=np.ones(1, np.float32))
  other = set_features.load(f'inception:{path}')
  assert not other.is_official
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  monkeypatch.setattr(inception, 'DIGEST', digest[:8])
  ours = set_features.load(f'inception:{path}', 'pytorch_fid')
  assert ours.is_official
  assert not ours.is_random
  assert ours.protocol == {
    'network': 'inception',
    'weights': ours.weights,
    'resize': 'half_pixel',
  }
  assert set_features.load('inception:random').is_random
  assert set_features.load('inception:random').protocol['resize'] == 'tf1'


def test_networks_without_a_class_token_give_the_mean_of_patches():
  network = set_features.load('dct', patch_size=4, dim=8)
  assert network.widths() == {'pool': 8}
  images = pixels.to_float(jax.numpy.asarray(sets.images(2)))
  patches = network.network({}, images).patches
  found = network.features({}, images)
  np.testing.assert_array_equal(found['pool'], patches.mean(axis=1))


def test_transformers_see_the_patches_of_their_training():
  """DINOv2 at 224 pixels with patches of 14, as FD of it is published."""
  for options, side in (({}, 224), ({'grid': 4}, 56)):
    network = set_features.load('dinov2_tiny', abstract=True, **options).network
    assert network.vit.patch_size == 14
    bare = dataclasses.replace(network, params={})
    protocol = set_features.SetNetwork(bare).protocol
    assert protocol['resize'] == f'bicubic to {side}x{side}'


def test_identity_changes_with_options_and_weights():
  def identity(spec, **options):
    return set_features.load(spec, **options).identity

  dct = identity('dct', patch_size=4, dim=8)
  assert dct == identity('dct', patch_size=4, dim=8)
  assert dct != identity('dct', patch_size=2, dim=8)
  gains = [
    set_features.SetNetwork(sets.Colours(gain=gain)).weights for gain in (1, 2)
  ]
  assert gains[0] != gains[1]
