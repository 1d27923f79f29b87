"""The hinge game of discriminator and tokenizer: the third term of Eq. (4)."""

from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LecamState: TypeAlias = dict[str, Float[Array, '']]


def hinge_discriminator(
  real: Float[Array, '*s'], fake: Float[Array, '*s']
) -> Float[Array, '']:
  """Returns (E relu(1 - D(real)) + E relu(1 + D(fake))) / 2."""
  real, fake = _wide(real), _wide(fake)
  real_part = jnp.mean(jax.nn.relu(1 - real))
  return 0.5 * (real_part + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Float[Array, '*s']) -> Float[Array, '']:
  """Returns -E D(fake): no hinge on this side, so it never saturates."""
  return -jnp.mean(_wide(fake))


def init_lecam() -> LecamState:
  """Creates LeCAM's running means {'real', 'fake'} of the logits, both 0."""
  return {
    'real': jnp.zeros((), jnp.float32),
    'fake': jnp.zeros((), jnp.float32),
  }


def lecam(
  state: LecamState,
  real: Float[Array, '*s'],
  fake: Float[Array, '*s'],
  *,
  decay: float = 0.999,
) -> tuple[Float[Array, ''], LecamState]:
  """Keeps each side's logits near the other side's running mean.

  E relu(D(real) - m_fake)^2 + E relu(m_real - D(fake))^2 (Tseng et al., 2021),
  with m the exponential moving averages of the mean logits. The averages take
  in the present logits *before* the regulariser reads them, as SoftVQ's code
  does, and carry no gradient. Means run over the batch that is given: with
  gradient accumulation there is one update for each part of the batch.

  Args:
    state: averages so far, from `init_lecam` or the last call.
    real: logits of images.
    fake: logits of reconstructions.
    decay: share of the old averages that each call keeps.

  Returns:
    The regulariser, without its weight, and the new state, to be stored and
    saved by the caller.
  """
  real, fake = _wide(real), _wide(fake)
  means = {'real': jnp.mean(real), 'fake': jnp.mean(fake)}
  state = {
    side: jax.lax.stop_gradient(decay * state[side] + (1 - decay) * mean)
    for side, mean in means.items()
  }
  above = jnp.mean(jnp.square(jax.nn.relu(real - state['fake'])))
  below = jnp.mean(jnp.square(jax.nn.relu(state['real'] - fake)))
  return above + below, state


def consistency(
  weak: tuple[Float[Array, '*s'], Float[Array, '*s']],
  strong: tuple[Float[Array, '*s'], Float[Array, '*s']],
) -> Float[Array, '']:
  """Mean square change of logits under a stronger augmentation.

  Averaged over the pair (real, fake); a discriminator makes it small
  by judging what augmentation leaves alone (Zhang et al., 2020).
  """
  for a, b in zip(weak, strong, strict=True):
    # A silent broadcast would still give a number.
    chex.assert_equal_shape((a, b))
  real, fake = (
    jnp.mean(jnp.square(_wide(a) - _wide(b)))
    for a, b in zip(weak, strong, strict=True)
  )
  return (real + fake) / 2


def pull(
  loss: Callable[[Float[Array, '*s']], tuple[Float[Array, ''], Any]],
  at: Float[Array, '*s'],
) -> tuple[Float[Array, ''], Any, Float[Array, '*s']]:
  """Evaluates a loss and, at the same time, its gradient in `at`.

  Args:
    loss: returns (value, auxiliary output) and depends on no trained array
      but its argument.
    at: the argument at which the loss and its gradient are taken.

  Returns:
    The value, whose backward pass reuses the computed gradient in place of a
    second pass through `loss`; the auxiliary output; and the gradient in `at`,
    a constant.
  """
  gradient_of = jax.value_and_grad(loss, has_aux=True)
  (value, other), gradient = gradient_of(jax.lax.stop_gradient(at))
  # Zero with derivative 1: it carries the known gradient and no value.
  nothing = at - jax.lax.stop_gradient(at)
  return value + jnp.sum(gradient * nothing), other, gradient


def adaptive_weight(
  features: Float[Array, 'b n d'],
  reconstruction: Float[Array, 'b n f'],
  adversarial: Float[Array, 'b n f'],
) -> Float[Array, '']:
  """Balances adversarial and reconstruction gradients at the last layer.

  The ratio of the norms of two gradients in the kernel of the decoder's last
  layer, as in VQGAN (Esser et al., 2021), within [0, 1e4] and a constant. The
  gradient in a kernel is its input times the gradient in its output, so that
  neither loss needs a second way back.

  Args:
    features: input of the last layer.
    reconstruction: gradient of the weighted reconstruction losses in that
      layer's output.
    adversarial: gradient there of the generator's loss, without its weight.
  """

  def norm(gradient: Float[Array, 'b n f']) -> Float[Array, '']:
    kernel = jnp.einsum(
      'bnd,bnf->df',
      _wide(features),
      _wide(gradient),
      precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.sqrt(jnp.sum(jnp.square(kernel)))

  # VQGAN's constants: the sum bounds the ratio where the game's gradient is 0.
  ratio = norm(reconstruction) / (norm(adversarial) + 1e-4)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))


def _wide(logits: Array) -> Array:
  # Means over many 16-bit logits would round away small changes.
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
