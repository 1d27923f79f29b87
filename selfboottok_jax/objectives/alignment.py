"""Alignment of tokens with a frozen encoder's patches: Eq. (6), (7) and REPA.

There are fewer tokens than patches and neither order means the other, so
"patchwise similarity" needs a pairing; ALIGNMENTS holds the three in use. Each
makes targets of the patches alone, so that they can be kept in place of them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax import errors


def repeat(patches: Float[Array, 'b n d'], k: int) -> Float[Array, 'b k d']:
  """Pairs each token with each of its n / k raster-consecutive patches.

  With more tokens than patches it is the mirror image: each patch against its
  k / n consecutive tokens.
  """
  # The cosine is linear in the unit patch: a group's mean cosine is the
  # product with its mean unit patch, and no token is ever repeated.
  return _grouped(_unit(patches), k)


def pool(patches: Float[Array, 'b n d'], k: int) -> Float[Array, 'b k d']:
  """Pairs each token with the mean of its n / k raster-consecutive patches.

  With more tokens than patches nothing is left to pool: same as `repeat`.
  """
  return _unit(_grouped(patches, k))


def pool_all(patches: Float[Array, 'b n d'], k: int) -> Float[Array, 'b 1 d']:
  """Pairs the mean token with the mean patch; k and n are free.

  SoftVQ's code averages tokens *before* its projector: for its numbers, project
  the mean token and give it as [b, 1, d].
  """
  del k
  return _unit(jnp.mean(patches, axis=1, keepdims=True))


def can_pair(patches: int, tokens: int, mode: str) -> bool:
  """True if a key of ALIGNMENTS pairs so many patches with so many tokens."""
  return mode == 'global' or not (patches % tokens and tokens % patches)


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
  return target_loss(make_targets(patches, tokens.shape[1], mode=mode), tokens)


def make_targets(
  patches: Float[Array, 'b n d'], k: int, *, mode: str = 'repeat'
) -> Float[Array, 'b m d']:
  """Targets of k tokens, the only thing `alignment_loss` reads of patches.

  Args:
    patches: features of a frozen encoder, raster order.
    k: number of tokens that will be compared with them.
    mode: a key of ALIGNMENTS.

  Returns:
    A vector of norm 1 or less for each token, or one for their mean ('global');
    float32 or wider.

  Raises:
    ConfigError: as `alignment_loss`.
  """
  n = patches.shape[1]
  errors.require_choice('alignment mode', mode, ALIGNMENTS)
  if not can_pair(n, k, mode):
    raise errors.ConfigError(
      f'alignment {mode!r} got {n} patches and {k} tokens, which do not divide '
      "one another; change the number of tokens or use mode 'global'"
    )
  dtype = jnp.promote_types(patches.dtype, jnp.float32)
  return ALIGNMENTS[mode](jax.lax.stop_gradient(patches.astype(dtype)), k)


def target_loss(
  targets: Float[Array, 'b m _'], tokens: Float[Array, 'b k _']
) -> Float[Array, '']:
  """Returns minus the mean inner product of targets and unit tokens.

  Args:
    targets: result of `make_targets`; a single one is for the mean token.
    tokens: our tokens, projected to the encoder's width.

  Returns:
    The loss in [-1, 1], in float32 or wider, not weighted.

  Raises:
    ConfigError: widths that differ.
  """
  if targets.shape[2] != tokens.shape[2]:
    raise errors.ConfigError(
      f'tokens of width {tokens.shape[2]} cannot align with patches of width '
      f'{targets.shape[2]}; project the tokens to {targets.shape[2]}'
    )
  tokens = tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))
  # Only 'global' makes fewer targets than tokens.
  if targets.shape[1] < tokens.shape[1]:
    tokens = jnp.mean(tokens, axis=1, keepdims=True)
  targets = jax.lax.stop_gradient(targets.astype(tokens.dtype))
  return -jnp.mean(jnp.sum(targets * _unit(tokens), axis=-1))


def class_loss(
  target: Float[Array, 'b d'], token: Float[Array, 'b d']
) -> Float[Array, '']:
  """Minus the mean cosine of a class vector and its token, in [-1, 1]."""
  return target_loss(make_targets(target[:, None], 1), token[:, None])


def entangled_loss(
  targets: Float[Array, 'b m d'] | None,
  tokens: Float[Array, 'b k d'],
  cls_target: Float[Array, 'b c'] | None,
  cls_token: Float[Array, 'b c'] | None,
) -> Float[Array, '']:
  """Computes REPA's loss for [class token; tokens], a mean over positions.

  With as many targets as tokens and a class token that is REG's mean over
  1 + k positions, `repeat` included: there a token's own cosine is the mean
  over its patches. A pair whose target is None is left out.
  """
  parts = []
  if targets is not None:
    parts.append((targets.shape[1], target_loss(targets, tokens)))
  if cls_target is not None:
    if cls_token is None:
      raise ValueError('a class target needs a class token')
    parts.append((1, class_loss(cls_target, cls_token)))
  positions = sum(count for count, _ in parts)
  return jnp.asarray(sum(count * loss for count, loss in parts) / positions)


def _grouped(patches: Float[Array, 'b n d'], k: int) -> Float[Array, 'b k d']:
  """Takes means of n / k consecutive patches, or each patch k / n times."""
  b, n, d = patches.shape
  if k > n:
    return jnp.repeat(patches, k // n, axis=1)
  return jnp.mean(patches.reshape(b, k, n // k, d), axis=2)


def _unit(x: Float[Array, '*b d']) -> Float[Array, '*b d']:
  # The floor is a norm of 1e-6: low enough to leave real features alone, high
  # enough that a token at zero has a finite gradient.
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))
