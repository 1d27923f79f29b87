import numpy as np
import pytest

from selfboottok_jax.evaluation import frechet
from tests.golden import fixtures

# For every case: which recorded numbers are the distance. torch-fidelity's
# other value and torchmetrics' take the mean or the eigenvalues in float32.
VALUES = {
  'fid_features': ('torch_fidelity_fid_f64mean', 'pytorch_fid'),
  'adm_frechet': ('fid', 'fid_swapped'),
}


@pytest.mark.golden
@pytest.mark.parametrize('name', VALUES)
def test_frechet_distance(name):
  fixture = fixtures.load('generator', name)
  arrays = fixture.arrays
  for case in fixture.meta['cases']:
    a, b = (
      frechet.fit(np.array_split(arrays[f'in.{case}_{i}'], 3)) for i in (1, 2)
    )
    for i, fit in ((1, a), (2, b)):
      for field, value in (('mu', fit.mean), ('sigma', fit.covariance)):
        array = f'out.{case}.{field}{i}'
        fixtures.check(name, array, value, arrays[array])
    for value in VALUES[name]:
      array = f'out.{case}.{value}'
      fixtures.check(name, array, frechet.frechet_distance(a, b), arrays[array])
