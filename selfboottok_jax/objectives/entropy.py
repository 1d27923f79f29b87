"""Entropy of soft assignments: the regulariser that Eq. (4) calls KL."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def assignment_entropy(
  logits: Float[Array, 'b n s v'],
  *,
  temperature: float = 0.01,
  pool: bool = False,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Computes the mean assignment entropy and the mean assignment's entropy.

  L_KL of Eq. (4) is the first minus the second: every token is to choose one
  code, all tokens together are to use all codes. The means run over the whole
  batch that is given, which under jit is the global one; with gradient
  accumulation the second entropy sees one part of the batch at a time.

  Args:
    logits: similarities at temperature 1 (cosines), for n codebooks that serve
      s tokens each and hold v codes.
    temperature: of the regulariser, independent of the quantiser's.
    pool: average code i of all codebooks together, as SoftVQ's code does,
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
  """Computes `assignment_entropy` without holding all logits in memory.

  They are made chunk by chunk, and again in the backward pass: between the two
  lie the tokens, and sums over tokens and over codes.

  Args:
    logits_of: similarities of tokens to the codes of their codebook.
    chunks: c chunks of m tokens a codebook.
    temperature: as in `assignment_entropy`.
    pool: as in `assignment_entropy`.

  Returns:
    The values of `assignment_entropy`, up to the order of summation.
  """
  c, b, n, m, _ = chunks.shape

  # Recomputed in the backward pass. Inside a scan nothing can be merged with
  # the forward pass, so the barriers against that are left out.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def add(totals: PyTree, tokens: Array) -> tuple[PyTree, None]:
    sums = _sums(logits_of(tokens), temperature)
    return jax.tree.map(jnp.add, totals, sums), None

  # The scan's carry needs its shapes and dtypes before any logits exist.
  shapes = jax.eval_shape(lambda x: _sums(logits_of(x), temperature), chunks[0])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  (entropy, probs), _ = jax.lax.scan(add, zeros, chunks)
  return _entropies(entropy, probs, c * b * n * m, pool)


def _sums(
  logits: Float[Array, 'b n s v'], temperature: float
) -> tuple[Float[Array, ''], Float[Array, 'n v']]:
  """Sums over tokens of their entropies, and of each code's probability."""
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  # Logarithms first: p log p stays finite where p underflows to 0.
  log_probs = jax.nn.log_softmax(logits.astype(dtype) / temperature, axis=-1)
  probs = jnp.exp(log_probs)
  return -jnp.sum(probs * log_probs), jnp.sum(probs, axis=(0, 2))


def _entropies(
  entropy: Float[Array, ''], probs: Float[Array, 'n v'], count: int, pool: bool
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """Turns sums over `count` tokens into `assignment_entropy`'s two values."""
  codebooks = probs.shape[0]
  mean = probs * (codebooks / count)
  if pool:
    mean = jnp.mean(mean, axis=0)
  # A mean probability can underflow to 0, where log has no gradient; 1e-6 is
  # the guard of SoftVQ's code.
  average_entropy = -jnp.mean(jnp.sum(mean * jnp.log(mean + 1e-6), axis=-1))
  return entropy / count, average_entropy
