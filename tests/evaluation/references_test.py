import dataclasses
import logging

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import data, errors
from selfboottok_jax.evaluation import references, set_features, set_scores
from tests.evaluation import sets

KEY = 'colours/pool'


def _wanted(metrics=('fd_colours', 'precision'), network=None):
  network = network or sets.Colours()
  return set_scores.SetMeasurement([network], metrics, sets.mesh()).wanted


def _official(metrics=('fid',)):
  return _wanted(metrics, sets.fake_inception())


def _open(path, wanted, tmp_path, **arguments):
  return references.open_reference(
    path,
    wanted,
    **{'image_size': 8, 'batch_size': 8, 'cache': tmp_path / 'c'} | arguments,
  )


@pytest.fixture
def folder(tmp_path):
  """Pictures on disk, and what their crops are."""
  pictures = sets.images(21)
  for split in ('train', 'val'):
    place = tmp_path / 'photos' / split / 'any'
    place.mkdir(parents=True)
    for index, picture in enumerate(pictures):
      Image.fromarray(picture).save(place / f'{index:03d}.png')
  return tmp_path / 'photos', pictures


def test_some_of_the_photographs_are_another_reference(folder, tmp_path):
  path, pictures = folder
  source = data.open_all(path)
  for rows in ([0, 2, 4, 6], [1, 3, 5, 7]):
    found = references.of_batches(
      data.make_row_dataset(source, np.array(rows), batch_size=8, image_size=8),
      _wanted(),
      image_size=8,
      cache=tmp_path,
    )
    wanted = sets.pool(pictures[rows])
    np.testing.assert_allclose(found.features[KEY], wanted, atol=4e-7)


def test_photographs_are_computed_once(folder, tmp_path, monkeypatch):
  path, pictures = folder
  wanted = sets.pool(pictures)
  first = _open(path, _wanted(), tmp_path)
  assert (first.count, first.crop) == (21, 'centre')
  np.testing.assert_allclose(first.features[KEY], wanted, atol=4e-7)
  np.testing.assert_allclose(
    first.gaussian(KEY).covariance, np.cov(wanted, rowvar=False), atol=1e-7
  )
  source = data.open_all(path, split='val')
  assert first.fingerprint == source.fingerprint

  def never(*_, **__):
    raise AssertionError

  monkeypatch.setattr(set_features.SetFeatures, 'add', never)
  second = _open(path, _wanted(), tmp_path, batch_size=16)
  np.testing.assert_array_equal(second.features[KEY], first.features[KEY])
  np.testing.assert_array_equal(
    second.gaussian(KEY).covariance, first.gaussian(KEY).covariance
  )
  # Whatever else the features depend on makes another entry.
  for wanted, arguments in (
    (_wanted(network=sets.Colours(gain=2.0)), {}),
    (_wanted(), {'num_images': 9}),
    (_wanted(), {'image_size': 4}),
  ):
    with pytest.raises(AssertionError):
      _open(path, wanted, tmp_path, **arguments)


def test_a_damaged_cache_is_computed_again(folder, tmp_path, caplog):
  path, _ = folder
  first = _open(path, _wanted(), tmp_path)
  (entry,) = (tmp_path / 'c' / 'references').iterdir()
  entry.write_bytes(entry.read_bytes()[:200])
  with caplog.at_level(logging.WARNING):
    again = _open(path, _wanted(), tmp_path)
  assert 'computing it again' in caplog.text
  np.testing.assert_array_equal(again.features[KEY], first.features[KEY])


def test_neighbours_are_looked_for_among_some(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(references, 'MOST_NEIGHBOURS', 7)
  path, pictures = folder
  found = _open(path, _wanted(), tmp_path)
  wanted = sets.pool(pictures)[2::3]
  np.testing.assert_allclose(found.features[KEY], wanted, atol=4e-7)
  assert found.gaussian(KEY).count == 21


def _statistics(width=12, seed=0, **others):
  rows = np.random.default_rng(seed).standard_normal((50, width))
  return {'mu': rows.mean(axis=0), 'sigma': np.cov(rows, rowvar=False)} | others


def test_adm_file(tmp_path):
  small = _statistics(3, seed=1)
  arrays = _statistics(mu_s=small['mu'], sigma_s=small['sigma'])
  arrays['arr_0'] = sets.images(9)
  np.savez(tmp_path / 'adm.npz', **arrays)
  wanted = _official(('fid', 'sfid', 'precision', 'is'))
  found = _open(tmp_path / 'adm.npz', wanted, tmp_path)
  for key, mean, covariance in (
    ('inception/pool', 'mu', 'sigma'),
    ('inception/spatial', 'mu_s', 'sigma_s'),
  ):
    np.testing.assert_array_equal(found.gaussian(key).mean, arrays[mean])
    np.testing.assert_array_equal(
      found.gaussian(key).covariance, arrays[covariance]
    )
  np.testing.assert_allclose(
    found.features['inception/pool'], sets.pool(arrays['arr_0']), atol=4e-7
  )
  assert found.count == 0
  assert not found.warnings


def test_pytorch_fid_file(tmp_path):
  np.savez(tmp_path / 'a.npz', **_statistics())
  found = _open(tmp_path / 'a.npz', _official(), tmp_path)
  assert found.gaussian('inception/pool').mean.shape == (12,)
  assert 'pytorch-fid' in found.warnings[0]


def test_images_serve_any_network(tmp_path):
  pictures = sets.images(10)
  np.savez(tmp_path / 'a.npz', **_statistics(arr_0=pictures))
  found = _open(tmp_path / 'a.npz', _wanted(), tmp_path)
  assert found.count == 10
  np.testing.assert_allclose(
    found.gaussian(KEY).mean, sets.pool(pictures).mean(axis=0), atol=1e-7
  )


NAN = {'mu': np.full(12, np.nan), 'sigma': np.eye(12)}
SKEWED = np.eye(12) + np.eye(12, k=1)
# Every variance is positive, but not that of all differences: eigenvalue -4.
INDEFINITE = 5 * np.ones((12, 12)) - 4 * np.eye(12)


@pytest.mark.parametrize(
  ('arrays', 'wanted', 'match'),
  [
    (_statistics(11), _official, r'mu has the shape \(11,\), wanted \(12,\)'),
    (_statistics() | {'sigma': np.eye(11)}, _official, r'\(11, 11\), wanted'),
    (_statistics() | {'sigma': np.ones(12)}, _official, 'sigma has the shape'),
    (_statistics() | {'sigma': SKEWED}, _official, 'not symmetric'),
    (_statistics() | {'sigma': -np.eye(12)}, _official, 'negative variance'),
    (_statistics() | {'sigma': INDEFINITE}, _official, 'negative variance'),
    (NAN, _official, 'mu .* not finite'),
    ({'mu': np.zeros(12, int), 'sigma': np.eye(12)}, _official, 'mu .int64'),
    ({'mu': np.zeros(12)}, _official, 'has no array sigma, only mu'),
    (_statistics(), _wanted, 'has no images .arr_0. to compute colours/pool'),
    ({'x': np.zeros(3)}, _official, 'no images .* only x'),
    ({'arr_0': sets.images(3)}, _wanted, 'has 3 images; wanted 4 or more'),
    ({'arr_0': sets.images(9, size=4)}, _wanted, 'images of 4x4, .* are 8x8'),
    (
      _statistics(arr_0=sets.images(9, size=4)),
      _official,
      'images of 4x4, .* are 8x8',
    ),
    ({'arr_0': np.zeros((9, 8, 8, 3))}, _wanted, 'arr_0 is float64'),
  ],
)
def test_bad_files(tmp_path, arrays, wanted, match):
  np.savez(tmp_path / 'bad.npz', **arrays)
  line = rf'\A[^\n]*{match}[^\n]*\Z'
  with pytest.raises(errors.DataError, match=line):
    _open(tmp_path / 'bad.npz', wanted(), tmp_path)
  assert not (tmp_path / 'c').exists()


def test_bad_photographs(folder, tmp_path):
  path, _ = folder
  with pytest.raises(errors.DataError, match='has 3 images'):
    _open(path, _wanted(), tmp_path, num_images=3)
  with pytest.raises(errors.DataError, match='does not exist'):
    _open(tmp_path / 'nowhere', _wanted(), tmp_path)
  (tmp_path / 'b.npz').write_bytes(b'PK nothing')
  with pytest.raises(errors.DataError, match='damaged or cut short'):
    _open(tmp_path / 'b.npz', _wanted(), tmp_path)


def test_a_reference_for_other_metrics_is_refused(folder, tmp_path):
  path, _ = folder
  found = _open(path, _wanted(('precision',)), tmp_path)
  empty = dataclasses.replace(found, gaussians={})
  with pytest.raises(errors.UserError, match='without features colours/pool'):
    empty.gaussian(KEY)
