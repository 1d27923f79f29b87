"""The paper's codebooks, with and without their logits in memory."""

import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.models import quantizers
from selfboottok_jax.objectives import entropy

B, K, E, N, V = 32, 64, 32, 4, 8192
CHUNK = 2


def _compile(chunk, batch):
  module = quantizers.SoftVQ(V, N, chunk=chunk)

  def loss(params, z):
    out = module.apply({'params': params}, z)
    if chunk:
      sample, average = entropy.chunked_assignment_entropy(
        out.logits_of, quantizers.split_tokens(out.segments, chunk)
      )
    else:
      sample, average = entropy.assignment_entropy(out.logits)
    return jnp.mean(jnp.sin(3 * out.codes)) + 0.01 * (sample - average)

  z = jax.ShapeDtypeStruct((batch, K, E), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), z)['params']
  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  return gradient.lower(params, z).compile()


def test_chunks_need_a_quarter_of_the_memory():
  plain, lean = (
    _compile(chunk, B).memory_analysis().temp_size_in_bytes
    for chunk in (0, CHUNK)
  )
  # At the least the logits of all tokens.
  assert plain > 4 * B * K * V
  assert lean < plain / 4


def test_gradients_are_the_same_at_full_size():
  batch = 4
  keys = jax.random.split(jax.random.key(0))
  z = jax.random.normal(keys[0], (batch, K, E))
  params = quantizers.SoftVQ(V, N).init(keys[1], z)['params']
  (one, plain), (other, lean) = (
    _compile(chunk, batch)(params, z) for chunk in (0, CHUNK)
  )
  np.testing.assert_allclose(one, other, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(lean), strict=True):
    assert np.abs(a).max() > 1e-7
    np.testing.assert_allclose(b, a, atol=1e-5 * float(np.abs(a).max()))
