import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.objectives import entropy

V = 8


def one_hot(indices):
  """Logits so sharp that the assignment is a choice."""
  return 10.0 * jax.nn.one_hot(jnp.asarray(indices), V)


@pytest.mark.parametrize('pool', [False, True])
def test_extremes(pool):
  # Every code once in each codebook: decided tokens, all codes in use.
  every = one_hot(np.arange(V).reshape(1, 1, V))
  sample, average = entropy.assignment_entropy(every, pool=pool)
  np.testing.assert_allclose(sample, 0, atol=1e-6)
  np.testing.assert_allclose(average, np.log(V), rtol=1e-4)
  # One code for all: decided tokens, one code in use.
  _, average = entropy.assignment_entropy(
    one_hot(np.zeros((2, 1, V), int)), pool=pool
  )
  np.testing.assert_allclose(average, 0, atol=1e-5)
  # No preference at all.
  both = entropy.assignment_entropy(jnp.zeros((2, 1, 3, V)), pool=pool)
  np.testing.assert_allclose(both, np.log(V), rtol=1e-4)


def test_codebooks_are_kept_apart_unless_pooled():
  # Codebook 0 uses code 0 alone, codebook 1 code 1 alone.
  logits = one_hot(np.array([[[0, 0], [1, 1]]]))
  _, apart = entropy.assignment_entropy(logits)
  _, pooled = entropy.assignment_entropy(logits, pool=True)
  np.testing.assert_allclose(apart, 0, atol=1e-5)
  np.testing.assert_allclose(pooled, np.log(2), rtol=1e-4)


def test_one_codebook_pools_to_itself():
  logits = jax.random.normal(jax.random.key(0), (2, 1, 4, V))
  np.testing.assert_allclose(
    entropy.assignment_entropy(logits, temperature=0.5),
    entropy.assignment_entropy(logits, temperature=0.5, pool=True),
    rtol=1e-6,
  )


def test_temperature_divides_the_logits():
  logits = jax.random.normal(jax.random.key(0), (2, 2, 4, V))
  np.testing.assert_allclose(
    entropy.assignment_entropy(logits, temperature=0.1),
    entropy.assignment_entropy(10 * logits, temperature=1.0),
    rtol=1e-4,
  )


def test_descent_decides_tokens_and_spreads_codes():
  logits = 0.1 * jax.random.normal(jax.random.key(0), (2, 1, 16, V))

  def parts(x):
    return entropy.assignment_entropy(x, temperature=1.0)

  step = jax.jit(jax.grad(lambda x: parts(x)[0] - parts(x)[1]))
  start, x = parts(logits), logits
  for _ in range(100):
    x = x - 20.0 * step(x)
  end = parts(x)
  assert end[0] < 0.5 * start[0]
  assert end[1] > 0.9 * np.log(V)


def test_low_precision_gives_float32_and_finite_gradients():
  logits = one_hot(np.zeros((1, 1, 2), int)).astype(jnp.bfloat16)
  values, gradients = jax.jit(
    lambda x: (
      entropy.assignment_entropy(x),
      jax.jacrev(lambda x: jnp.stack(entropy.assignment_entropy(x)))(x),
    )
  )(logits)
  assert all(v.dtype == jnp.float32 for v in values)
  assert jnp.all(jnp.isfinite(gradients.astype(jnp.float32)))


@pytest.mark.parametrize('pool', [False, True])
def test_chunks_change_neither_values_nor_gradients(pool):
  tokens = jax.random.normal(jax.random.key(0), (3, 2, 6, 4))
  codes = jax.random.normal(jax.random.key(1), (2, V, 4))
  options = {'temperature': 0.5, 'pool': pool}

  def logits_of(tokens):
    return jnp.einsum('bnse,nve->bnsv', tokens, codes)

  def plain(tokens):
    return jnp.stack(entropy.assignment_entropy(logits_of(tokens), **options))

  def chunked(tokens):
    chunks = jnp.moveaxis(tokens.reshape(3, 2, 3, 2, 4), 2, 0)
    return jnp.stack(
      entropy.chunked_assignment_entropy(logits_of, chunks, **options)
    )

  for function in (lambda f: f, jax.jacrev):
    np.testing.assert_allclose(
      jax.jit(function(chunked))(tokens),
      jax.jit(function(plain))(tokens),
      atol=1e-6,
    )
