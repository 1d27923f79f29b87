import dataclasses
import json

import numpy as np
import pytest
import scipy.special

from selfboottok_jax import errors
from selfboottok_jax.evaluation import (
  frechet,
  inception_score,
  precision_recall,
  references,
  set_scores,
)
from tests.evaluation import sets
from tests.launch import commands

OFFICIAL = ('fid', 'rfid', 'sfid', 'is', 'precision', 'recall')


def _reference(measurement, pictures, tmp_path, name='real'):
  path = tmp_path / f'{name}.npz'
  np.savez(path, arr_0=pictures)
  return references.open_reference(
    path, measurement.wanted, image_size=8, batch_size=16, cache=tmp_path
  )


def _measure(networks, metrics, pictures, size=16, devices=8, **arguments):
  measurement = set_scores.SetMeasurement(
    networks, metrics, sets.mesh(devices), **arguments
  )
  for batch in sets.batches(pictures, size):
    measurement.add(batch)
  return measurement


def _fit(rows):
  return frechet.Gaussian(rows.mean(axis=0), np.cov(rows, rowvar=False), 0)


def test_every_score_of_inception(tmp_path):
  real, made = sets.images(90), sets.images(70, seed=1)
  measurement = _measure([sets.fake_inception()], OFFICIAL, made)
  reference = _reference(measurement, real, tmp_path)
  found = {m: (v, p) for m, v, p in measurement.finish(reference)}
  assert tuple(found) == OFFICIAL
  a, b = sets.pool(made), sets.pool(real)
  fid = frechet.frechet_distance(_fit(a), _fit(b))
  # The spatial features: squares of the first three.
  sfid = frechet.frechet_distance(_fit(a[:, :3] ** 2), _fit(b[:, :3] ** 2))
  share = scipy.special.softmax(5 * a, axis=1)
  gain = (share * np.log(share / share.mean(axis=0))).sum(axis=1).mean()
  both = precision_recall.precision_recall(b.astype('f'), a.astype('f'))
  for metric, value in (
    *(('fid', fid), ('rfid', fid), ('sfid', sfid), ('is', np.exp(gain))),
    *(('precision', both[0]), ('recall', both[1])),
  ):
    np.testing.assert_allclose(found[metric][0], value, rtol=1e-5)
  protocol = found['fid'][1]
  assert protocol == {
    'backend': 'cpu',
    'network': 'inception',
    'weights': protocol['weights'],
    'resize': 'tf1',
    'count': 70,
    'convention': 'adm',
    'reference': str(tmp_path / 'real.npz'),
    'reference_fingerprint': reference.fingerprint[:12],
    'reference_count': 90,
  }
  assert found['precision'][1]['neighbours'] == 3
  assert found['is'][1]['splits'] == 'of 5000, shuffled'
  assert found['is'][1]['warning'].startswith('parts of 70 images bias it')


@pytest.mark.parametrize(('size', 'devices'), [(7, 8), (24, 1), (70, 8)])
def test_batches_and_devices_change_no_score(tmp_path, size, devices):
  real, made = sets.images(60), sets.images(70, seed=1)
  metrics = ('fid', 'sfid', 'is', 'precision', 'recall')

  def scores(size, devices):
    measurement = _measure(
      [sets.fake_inception()], metrics, made, size, devices
    )
    reference = _reference(measurement, real, tmp_path)
    return [value for _, value, _ in measurement.finish(reference)]

  np.testing.assert_allclose(scores(size, devices), scores(16, 8), rtol=1e-5)


@pytest.mark.slow
def test_two_processes_measure_as_one(photos, tmp_path):
  def scores(count, size):
    out = tmp_path / f'{count}.json'
    arguments = ['hog', photos, photos, size, 100, out]
    if count == 1:
      arguments = [str(argument) for argument in arguments]
      alone = commands.spawn('tests.evaluation.measure', *arguments)
      _, error = alone.communicate(timeout=600)
      assert alone.returncode == 0, error
    else:
      commands.run_together('tests.evaluation.measure', *map(str, arguments))
    return json.loads(out.read_text())

  alone, together = scores(1, 3), scores(2, 6)
  assert together['devices'] == 2
  for name in ('fd_hog', 'precision', 'recall'):
    np.testing.assert_allclose(together[name], alone[name], rtol=1e-5)


def test_a_set_against_itself(tmp_path):
  pictures = sets.images(50)
  measurement = _measure(
    [sets.Colours()], ('fd_colours', 'precision', 'recall'), pictures
  )
  reference = _reference(measurement, pictures, tmp_path)
  distance, precision, recall = (
    value for _, value, _ in measurement.finish(reference)
  )
  trace = np.trace(reference.gaussian('colours/pool').covariance)
  assert distance < 1e-6 * trace
  assert precision == recall == 1


def test_conventions_of_the_inception_score(tmp_path):
  made = sets.images(33)
  logits = (5 * sets.pool(made))[inception_score.shuffle(33)]
  for convention, value in (
    ('adm', inception_score.score_in_parts_of(logits)),
    ('torch_fidelity', inception_score.score_in_parts(logits)[0]),
  ):
    measurement = _measure(
      [sets.fake_inception()], ('is',), made, convention=convention
    )
    ((metric, found, protocol),) = measurement.finish()
    assert (metric, protocol['convention']) == ('is', convention)
    np.testing.assert_allclose(found, value, rtol=1e-5)


def test_ratio_of_distances(tmp_path):
  """The mean over networks of FD / FD of real validation images."""
  networks = [sets.Colours(), sets.Colours('others', gain=3.0)]
  measurement = _measure(networks, ('fdr',), sets.images(40, seed=1))
  real, other = sets.images(60), sets.images(40, seed=2)
  reference = _reference(measurement, real, tmp_path)
  validation = _reference(measurement, other, tmp_path, 'validation')
  ((metric, value, protocol),) = measurement.finish(reference, validation)
  made, other, real = (
    _fit(sets.pool(x)) for x in (sets.images(40, seed=1), other, real)
  )
  # The gain cancels.
  wanted = frechet.frechet_distance(made, real)
  wanted /= frechet.frechet_distance(other, real)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  assert metric == 'fdr'
  assert protocol['network'] == 'colours, others'
  assert protocol['validation_count'] == 40
  for given in (None, reference):
    with pytest.raises(errors.ConfigError, match='fdr divides .* two sets'):
      measurement.finish(reference, given)
  same = dataclasses.replace(reference, fingerprint='another')
  with pytest.raises(errors.DataError, match='divides by 0'):
    measurement.finish(reference, same)


def test_biased_counts_carry_a_warning(tmp_path):
  made = sets.images(12)
  measurement = _measure([sets.Colours()], ('fd_colours',), made)
  reference = _reference(measurement, sets.images(13, seed=1), tmp_path)
  ((_, _, protocol),) = measurement.finish(reference)
  assert protocol['warning'] == (
    '12 images for 12 features bias it upwards: compare at equal counts alone'
  )


def test_features_are_counted_where_a_file_has_statistics_too(tmp_path):
  """Statistics of unknown images beside images hide no count of these."""
  measurement = _measure([sets.Colours()], ('fd_colours',), sets.images(40))
  few = _reference(measurement, sets.images(12, seed=1), tmp_path)
  ((_, _, protocol),) = measurement.finish(dataclasses.replace(few, count=0))
  assert protocol['reference_count'] == 12
  assert protocol['warning'].startswith('12 reference images for 12 features')


def test_warnings_of_statistics_and_random_weights(tmp_path):
  rows = sets.pool(sets.images(40, seed=3))
  np.savez(
    tmp_path / 'a.npz', mu=rows.mean(axis=0), sigma=np.cov(rows, rowvar=False)
  )
  for convention, resize, warns in (
    ('adm', 'tf1', True),
    ('pytorch_fid', 'half_pixel', False),
  ):
    measurement = _measure(
      [sets.fake_inception(resize)],
      ('fid',),
      sets.images(40),
      convention=convention,
    )
    reference = references.open_reference(
      tmp_path / 'a.npz', measurement.wanted, image_size=8, cache=tmp_path
    )
    ((_, _, protocol),) = measurement.finish(reference)
    assert ('warning' in protocol) == warns


INCEPTION = [sets.fake_inception()]
COLOURS = [sets.Colours()]


@pytest.mark.parametrize(
  ('networks', 'metrics', 'convention', 'match'),
  [
    (COLOURS, ('fid',), 'adm', 'weights of 2015-12-05.*measure fd_colours'),
    (COLOURS, ('is',), 'adm', 'weights of 2015-12-05'),
    (COLOURS, (), 'adm', 'metrics='),
    (COLOURS, ('fd_hog',), 'adm', "'fd_hog'; wanted .*fd_colours"),
    (COLOURS, ('psnr',), 'adm', "metrics='psnr'"),
    (COLOURS, ('fdr',), 'adm', "fdr='colours'; wanted two networks"),
    (COLOURS, ('precision',), 'tf', "convention='tf'"),
    (INCEPTION, ('fid',), 'pytorch_fid', 'resize tf1 .* half_pixel'),
    (INCEPTION, ('sfid',), 'torch_fidelity', 'sfid is not defined'),
  ],
)
def test_metrics_that_networks_cannot_give(
  networks, metrics, convention, match
):
  with pytest.raises(errors.ConfigError, match=match):
    set_scores.SetMeasurement(networks, metrics, sets.mesh(), convention)


def test_few_images_or_no_reference(tmp_path):
  measurement = _measure(COLOURS, ('fd_colours',), sets.images(3))
  with pytest.raises(errors.DataError, match='3 images to score'):
    measurement.finish()
  measurement = _measure(COLOURS, ('fd_colours', 'recall'), sets.images(8))
  with pytest.raises(errors.ConfigError, match='without a reference'):
    measurement.finish()
  reference = _reference(measurement, sets.images(9), tmp_path)
  with pytest.raises(errors.UserError, match='open it for precision'):
    measurement.finish(dataclasses.replace(reference, features={}))
