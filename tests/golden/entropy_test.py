"""Entropies of recorded assignments."""

import jax.numpy as jnp
import pytest

from selfboottok_jax.objectives import entropy
from tests.golden import fixtures

pytestmark = pytest.mark.golden


@pytest.mark.parametrize('name', ['tok01_quantizer_n1', 'tok01_quantizer_n4'])
def test_pooled_entropies(name):
  recorded = fixtures.load('tokenizer', name)
  sample, average = entropy.assignment_entropy(
    jnp.asarray(recorded.arrays['out_cos_logits']), pool=True
  )
  actual = {
    'out_sample_entropy': sample,
    'out_avg_entropy': average,
    'out_entropy_loss': recorded.meta['entropy_loss_ratio']
    * (sample - average),
  }
  for key, value in actual.items():
    fixtures.check(name, key, value, recorded.arrays[key])
