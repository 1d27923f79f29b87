"""Entropy of soft assignments: the regulariser that Eq. (4) calls KL."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def assignment_entropy(
  logits: Float[Array, 'b n s v'],
  *,
  temperature: float = 0.01,
  pool: bool = False,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Mean entropy of the assignments, and entropy of the mean assignment.

  L_KL of Eq. (4) is the first minus the second: every token is to choose one
  code, all tokens together are to use all codes. The means run over the whole
  batch that is given, which under jit is the global one; with gradient
  accumulation the second entropy sees one part of the batch at a time.

  Args:
    logits: similarities at temperature 1 (cosines), for n codebooks that serve
      s tokens each and hold v codes.
    temperature: the regulariser's own; the quantiser's is another.
    pool: average code i of all codebooks together, as the reference does,
      instead of keeping the codebooks apart.

  Returns:
    Both entropies in nats, each in [0, log v], in float32 or wider, averaged
    over codebooks.
  """
  b, n, s, _ = logits.shape
  return _entropies(*_sums(logits, temperature), b * n * s, pool)


def chunked_assignment_entropy(
  logits_of: Callable[[Float[Array, 'b n m e']], Float[Array, 'b n m v']],
  chunks: Float[Array, 'c b n m e'],
  *,
  temperature: float = 0.01,
  pool: bool = False,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """`assignment_entropy` without the logits of all tokens in memory at once.

  They are made chunk by chunk, and again in the backward pass: between the two
  lie the tokens, and sums over tokens and over codes.

  Args:
    logits_of: similarities of tokens to the codes of their codebook.
    chunks: c chunks of m tokens a codebook.
    temperature: as in `assignment_entropy`.
    pool: as in `assignment_entropy`.

  Returns:
    What `assignment_entropy` does, but for the order of sums.
  """
  c, b, n, m, _ = chunks.shape

  @functools.partial(jax.checkpoint, prevent_cse=False)
  def add(totals, tokens):
    sums = _sums(logits_of(tokens), temperature)
    return jax.tree.map(jnp.add, totals, sums), None

  shapes = jax.eval_shape(lambda x: _sums(logits_of(x), temperature), chunks[0])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  sums, _ = jax.lax.scan(add, zeros, chunks)
  return _entropies(*sums, c * b * n * m, pool)


def _sums(logits, temperature):
  """Over all tokens: of their entropies, and of each code's probability."""
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  log_probs = jax.nn.log_softmax(logits.astype(dtype) / temperature, axis=-1)
  probs = jnp.exp(log_probs)
  return -jnp.sum(probs * log_probs), jnp.sum(probs, axis=(0, 2))


def _entropies(entropy, probs, count: int, pool: bool):
  """Sum of entropies and [n, v] sums of probabilities, over `count` tokens."""
  codebooks = probs.shape[0]
  mean = probs * (codebooks / count)
  if pool:
    mean = jnp.mean(mean, axis=0)
  # A mean probability can underflow to 0, where log has no gradient; 1e-6 is
  # the reference's guard.
  average_entropy = -jnp.mean(jnp.sum(mean * jnp.log(mean + 1e-6), axis=-1))
  return entropy / count, average_entropy
