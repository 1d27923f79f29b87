"""Entropy of soft assignments: the regulariser that Eq. (4) calls KL."""

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
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  log_probs = jax.nn.log_softmax(logits.astype(dtype) / temperature, axis=-1)
  probs = jnp.exp(log_probs)
  sample_entropy = -jnp.mean(jnp.sum(probs * log_probs, axis=-1))
  mean = jnp.mean(probs, axis=(0, 1, 2) if pool else (0, 2))
  # A mean probability can underflow to 0, where log has no gradient; 1e-6 is
  # the reference's guard.
  average_entropy = -jnp.mean(jnp.sum(mean * jnp.log(mean + 1e-6), axis=-1))
  return sample_entropy, average_entropy
