"""Alignment of tokens with a frozen encoder's patches: Eq. (6) and (7).

There are fewer tokens than patches and neither order means the other, so
"patchwise similarity" needs a pairing; ALIGNMENTS holds the three in use.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import errors


def repeat(
  patches: Float[Array, 'b n d'], tokens: Float[Array, 'b k d']
) -> Float[Array, '']:
  """Each token against each of its n / k raster-consecutive patches.

  With more tokens than patches it is the mirror image: each patch against its
  k / n consecutive tokens.
  """
  # The cosine is linear in the unit patch: a group's mean cosine is the
  # product with its mean unit patch, and no token is ever repeated.
  return -_mean_product(_grouped(_unit(patches), tokens.shape[1]), tokens)


def pool(
  patches: Float[Array, 'b n d'], tokens: Float[Array, 'b k d']
) -> Float[Array, '']:
  """Each token against the mean of its n / k raster-consecutive patches.

  With more tokens than patches nothing is left to pool: same as `repeat`.
  """
  return -_mean_product(_unit(_grouped(patches, tokens.shape[1])), tokens)


def pool_all(
  patches: Float[Array, 'b n d'], tokens: Float[Array, 'b k d']
) -> Float[Array, '']:
  """The mean token against the mean patch; k and n are free.

  The reference averages tokens *before* its projector: for its numbers, project
  the mean token and give it as [b, 1, d].
  """
  mean = jnp.mean(tokens, axis=1, keepdims=True)
  return -_mean_product(_unit(jnp.mean(patches, axis=1, keepdims=True)), mean)


ALIGNMENTS = {'repeat': repeat, 'pool': pool, 'global': pool_all}


def alignment_loss(
  patches: Float[Array, 'b n _'],
  tokens: Float[Array, 'b k _'],
  *,
  mode: str = 'repeat',
) -> Float[Array, '']:
  """L_repa of Eq. (6) (global tokens) and Eq. (7) (local tokens).

  Minus the mean cosine of paired patches and tokens. The patches are a fixed
  target: no gradient goes to them.

  Args:
    patches: features of a frozen encoder, raster order.
    tokens: our tokens, projected to the encoder's width.
    mode: a key of ALIGNMENTS. For 'repeat' and 'pool', n and k must divide
      one another.

  Returns:
    The loss in [-1, 1], in float32 or wider, not weighted.

  Raises:
    ConfigError: unknown mode, widths that differ, or counts that do not divide.
  """
  n, k = patches.shape[1], tokens.shape[1]
  if mode not in ALIGNMENTS:
    raise errors.ConfigError(
      f'alignment mode {mode!r} is unknown; choose one of {sorted(ALIGNMENTS)}'
    )
  if patches.shape[2] != tokens.shape[2]:
    raise errors.ConfigError(
      f'tokens of width {tokens.shape[2]} cannot align with patches of width '
      f'{patches.shape[2]}; project the tokens to {patches.shape[2]}'
    )
  if mode != 'global' and n % k and k % n:
    raise errors.ConfigError(
      f'alignment {mode!r} got {n} patches and {k} tokens, which do not divide '
      "one another; change the number of tokens or use mode 'global'"
    )
  dtype = jnp.promote_types(tokens.dtype, jnp.float32)
  patches = jax.lax.stop_gradient(patches.astype(dtype))
  return ALIGNMENTS[mode](patches, tokens.astype(dtype))


def _grouped(patches, k):
  """Means of n / k consecutive patches, or each patch k / n times."""
  b, n, d = patches.shape
  if k > n:
    return jnp.repeat(patches, k // n, axis=1)
  return jnp.mean(patches.reshape(b, k, n // k, d), axis=2)


def _mean_product(targets, tokens):
  return jnp.mean(jnp.sum(targets * _unit(tokens), axis=-1))


def _unit(x):
  # The floor is a norm of 1e-6: low enough to leave real features alone, high
  # enough that a token at zero has a finite gradient.
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
