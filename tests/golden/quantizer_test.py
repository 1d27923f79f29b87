"""SoftVQ: codes, assignments, entropies and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import quantizers
from selfboottok_jax.objectives import entropy
from tests.golden import fixtures

pytestmark = pytest.mark.golden

# The reference's own scrambled view of its indices; not to be reproduced.
LEFT_OUT = {'out_indices_as_returned'}


def _quantize(meta, z, codebook):
  module = quantizers.SoftVQ(
    meta['n_e'], meta['num_codebooks'], 'cosine', meta['tau']
  )
  return module.apply({'params': {'codebook': codebook}}, z)


def _entropies(meta, logits):
  sample, average = entropy.assignment_entropy(logits, pool=True)
  return sample, average, meta['entropy_loss_ratio'] * (sample - average)


def _losses(meta, r, z, codebook):
  """Sum(z_q * r), and the entropy term."""
  out = _quantize(meta, z, codebook)
  return jnp.sum(out.codes * r), _entropies(meta, out.logits)[2]


@pytest.mark.parametrize('name', ['tok01_quantizer_n1', 'tok01_quantizer_n4'])
def test_every_recorded_array(name):
  recorded = fixtures.load('tokenizer', name)
  meta = recorded.meta
  assert meta['l2_norm']
  z, r = (jnp.asarray(recorded.arrays[k]) for k in ('in_z', 'in_r'))
  codebook = jnp.asarray(recorded.weights['embedding'])
  losses = functools.partial(_losses, meta, r)

  @jax.jit
  def evaluate(z, codebook):
    out = _quantize(meta, z, codebook)
    of_codes, of_entropy = jax.jacrev(losses, argnums=(0, 1))(z, codebook)
    return out, _entropies(meta, out.logits), of_codes, of_entropy

  out, entropies, of_codes, of_entropy = evaluate(z, codebook)
  sample, average, entropy_loss = entropies
  # The codebook is detached in the logits, hence in the entropy.
  np.testing.assert_array_equal(of_entropy[1], 0.0)
  cosines = jnp.sum(quantizers.unit(z) * quantizers.unit(out.codes), axis=-1)
  actual = {
    'out_z_q': out.codes,
    'out_indices': out.indices,
    'out_cos_logits': out.logits,
    'out_probs': out.probs,
    'out_avg_probs': jnp.mean(out.probs),
    'out_max_probs': jnp.mean(jnp.max(out.probs, axis=-1)),
    'out_zq_z_cos': jnp.mean(cosines),
    'out_sample_entropy': sample,
    'out_avg_entropy': average,
    'out_entropy_loss': entropy_loss,
    'out_scalar': jnp.sum(out.codes * r) + entropy_loss,
    'out_grad_z': of_codes[0] + of_entropy[0],
    'out_grad_codebook': of_codes[1],
    'out_grad_z_zq_only': of_codes[0],
    'out_grad_z_entropy_only': of_entropy[0],
  }
  outputs = {k for k in recorded.arrays if k.startswith('out_')}
  assert outputs - LEFT_OUT == set(actual)
  for key, value in actual.items():
    fixtures.check(name, key, value, recorded.arrays[key])
