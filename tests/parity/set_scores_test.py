"""Scores of 300 photographs beside pytorch-fid's and torch-fidelity's.

On random weights: Inception at its full size, each network run once.
"""

import os
import pathlib
import types

import jax
import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from pytorch_fid import fid_score
from torch_fidelity import feature_extractor_inceptionv3, metric_fid, metric_isc

from selfboottok_jax import data
from selfboottok_jax.evaluation import (
  frechet,
  inception_score,
  references,
  set_features,
  set_scores,
)
from selfboottok_jax.pretrained import inception
from selfboottok_jax.training import sharding
from tests.parity import public
from tests.pretrained import weights as weights_lib

MADE, REAL = 180, 120
# The issue is conventions: a wrong one shows in percents.
TOLERANCE = 1e-3


@pytest.fixture(scope='module')
def photographs():
  folder = pathlib.Path(os.environ.get('DATA') or weights_lib.SHARED / 'data')
  path = folder / 'imagenette64.tar'
  if not path.exists():
    assert 'DATA' not in os.environ, f'no imagenette64.tar in DATA={folder}'
    pytest.skip(f'no imagenette64.tar in {folder}; set DATA to its folder')
  source = data.open_source('auto', path, 'val', 64)
  chosen = np.arange(MADE + REAL) * len(source) // (MADE + REAL)
  # In another order than by class.
  chosen = np.random.default_rng(0).permutation(chosen)
  return np.stack([source[int(index)]['image'] for index in chosen])


@pytest.fixture(scope='module')
def weights():
  network = torchvision.models.inception_v3(
    weights=None, num_classes=1008, aux_logits=False, init_weights=False
  )
  arrays = public.state_dict(public.randomise(network))
  # Else every picture gets about the same probabilities.
  arrays['fc.weight'] = 40 * arrays['fc.weight']
  return arrays


@pytest.fixture(scope='module')
def theirs(photographs, weights, tmp_path_factory):
  """torch-fidelity's features of all photographs."""
  path = tmp_path_factory.mktemp('weights') / 'weights.pth'
  torch.save({n: torch.from_numpy(a) for n, a in weights.items()}, path)
  names = ['2048', 'logits_unbiased']
  extractor = feature_extractor_inceptionv3.FeatureExtractorInceptionV3(
    'inception', names, feature_extractor_weights_path=str(path)
  )
  parts = [
    extractor(public.to_torch(photographs[i : i + 30]))
    for i in range(0, len(photographs), 30)
  ]
  pool, logits = (torch.cat(part) for part in zip(*parts, strict=True))
  return pool, logits


@pytest.fixture(scope='module')
def ours(photographs, weights, tmp_path_factory):
  """All scores and their protocols, and the features that were compared."""
  network = inception.Inception()
  params = network.read(weights, 'test')
  network = inception.Inception(params=params)
  measurement = set_scores.SetMeasurement(
    [set_features.SetNetwork(network, is_official=True)],
    ('fid', 'is', 'precision', 'recall'),
    sharding.make_mesh(devices=jax.devices()[:1]),
    convention='torch_fidelity',
  )
  for first in range(0, MADE, 30):
    batch = photographs[first : first + 30]
    measurement.add({'image': batch, 'mask': np.ones(len(batch), bool)})
  folder = tmp_path_factory.mktemp('reference')
  np.savez(folder / 'real.npz', arr_0=photographs[MADE:])
  reference = references.open_reference(
    folder / 'real.npz',
    measurement.wanted,
    image_size=64,
    batch_size=30,
    cache=folder,
  )
  scores = {m: v for m, v, _ in measurement.finish(reference)}
  return scores, measurement, reference


def test_fid_of_torch_fidelity(theirs, ours):
  pool, _ = theirs
  scores, _, _ = ours
  made, real = (
    metric_fid.fid_features_to_statistics(part)
    for part in (pool[:MADE], pool[MADE:])
  )
  found = metric_fid.fid_statistics_to_metric(made, real, verbose=False)
  value = found[metric_fid.KEY_METRIC_FID]
  np.testing.assert_allclose(scores['fid'], value, rtol=TOLERANCE)


@pytest.mark.filterwarnings('ignore::scipy.linalg.LinAlgWarning')
def test_distance_of_pytorch_fid(theirs, monkeypatch):
  """On a quarter of the features: the root of a matrix takes a minute else."""
  # It asks scipy for an error too, which newer ones do not give.
  root = scipy.linalg.sqrtm
  shim = types.SimpleNamespace(sqrtm=lambda x, disp: (root(x), 0))
  monkeypatch.setattr(fid_score, 'linalg', shim)
  pool = theirs[0][:, ::4].numpy()
  made, real = frechet.fit([pool[:MADE]]), frechet.fit([pool[MADE:]])
  value = fid_score.calculate_frechet_distance(
    made.mean, made.covariance, real.mean, real.covariance
  )
  found = frechet.frechet_distance(made, real)
  np.testing.assert_allclose(found, value, rtol=TOLERANCE)


def test_inception_score_of_torch_fidelity(theirs, ours):
  _, logits = theirs
  found = metric_isc.isc_features_to_metric(logits[:MADE])
  value = found[metric_isc.KEY_METRIC_ISC_MEAN]
  np.testing.assert_allclose(ours[0]['is'], value, rtol=TOLERANCE)
  # Parts of another size would be seen.
  other = inception_score.score_in_parts_of(logits[:MADE].numpy())
  assert abs(other / value - 1) > 2 * TOLERANCE


def test_a_set_against_itself(ours):
  _, measurement, reference = ours
  (key,) = measurement.wanted.moments
  fit = reference.gaussian(key)
  distance = frechet.frechet_distance(fit, fit)
  assert distance < 1e-6 * np.trace(fit.covariance)


def test_neighbours_by_brute_force(theirs, ours):
  scores, _, _ = ours
  made, real = (
    x.numpy().astype(np.float64) for x in theirs[0].split([MADE, REAL])
  )

  def squares(a, b):
    shifts = (np.square(a - row).sum(axis=1) for row in b)
    return np.stack(list(shifts), axis=1)

  def radii(x):
    return np.sort(squares(x, x), axis=1)[:, 3]

  between = squares(real, made)
  precision = (between <= radii(real)[:, None]).any(axis=0).mean()
  recall = (between <= radii(made)[None]).any(axis=1).mean()
  assert scores['precision'] == precision
  assert scores['recall'] == recall
