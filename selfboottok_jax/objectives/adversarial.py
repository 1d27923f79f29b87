"""The hinge game of discriminator and tokenizer: the third term of Eq. (4)."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LecamState = dict[str, Float[Array, '']]


def hinge_discriminator(
  real: Float[Array, '*s'], fake: Float[Array, '*s']
) -> Float[Array, '']:
  """Half of E relu(1 - D(real)) + E relu(1 + D(fake))."""
  real, fake = _wide(real), _wide(fake)
  real_part = jnp.mean(jax.nn.relu(1 - real))
  return 0.5 * (real_part + jnp.mean(jax.nn.relu(1 + fake)))


def hinge_generator(fake: Float[Array, '*s']) -> Float[Array, '']:
  """Minus E D(fake): no hinge on this side, so it never saturates."""
  return -jnp.mean(_wide(fake))


def init_lecam() -> LecamState:
  """LeCAM's running means of the logits, {'real', 'fake'}, both at 0."""
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
  in the present logits *before* the regulariser reads them, as the reference
  does, and carry no gradient. Means run over the batch that is given: with
  gradient accumulation there is one update for each part of the batch.

  Args:
    state: averages so far, from `init_lecam` or the last call.
    real: logits of images.
    fake: logits of reconstructions.
    decay: of the averages, per call.

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
  """How much a stronger augmentation of the images changes their logits.

  The mean square over (real, fake) of each, which a discriminator makes small
  by judging what augmentation leaves alone (Zhang et al., 2020).
  """
  squares = [
    jnp.mean(jnp.square(_wide(a) - _wide(b)))
    for a, b in zip(weak, strong, strict=True)
  ]
  return sum(squares) / len(squares)


def pull(
  loss: Callable[[Float[Array, '*s']], tuple[Float[Array, ''], Any]],
  at: Float[Array, '*s'],
) -> tuple[Float[Array, ''], Any, Float[Array, '*s']]:
  """A loss whose gradient in `at` is known beside its value.

  Args:
    loss: returns (value, anything else); nothing but `at` in it is trained.
    at: where to take it.

  Returns:
    The value, differentiable as ever, though backpropagation finds the gradient
    done and goes through `loss` no second time; what else `loss` returned; and
    the gradient in `at`, a constant.
  """
  gradient_of = jax.value_and_grad(loss, has_aux=True)
  (value, other), gradient = gradient_of(jax.lax.stop_gradient(at))
  nothing = at - jax.lax.stop_gradient(at)
  return value + jnp.sum(gradient * nothing), other, gradient


def adaptive_weight(
  features: Float[Array, 'b n d'],
  reconstruction: Float[Array, 'b n f'],
  adversarial: Float[Array, 'b n f'],
) -> Float[Array, '']:
  """How much stronger reconstruction pulls at the last layer than the game.

  The ratio of the norms of two gradients in the kernel of the decoder's last
  layer, as in VQGAN (Esser et al., 2021), within [0, 1e4] and a constant. The
  gradient in a kernel is its input times the gradient in its output, so that
  neither loss needs a second way back.

  Args:
    features: what the last layer takes.
    reconstruction: gradient of the weighted reconstruction losses in what it
      returns.
    adversarial: gradient there of the generator's loss, without its weight.
  """

  def norm(gradient):
    kernel = jnp.einsum('bnd,bnf->df', _wide(features), _wide(gradient))
    return jnp.sqrt(jnp.sum(jnp.square(kernel)))

  ratio = norm(reconstruction) / (norm(adversarial) + 1e-4)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1e4))


@flax.struct.dataclass
class DiscriminatorLoss:
  """The game's part of the discriminator's loss, and LeCAM's next state.

  Attributes:
    loss: hinge + lecam_weight x regulariser.
    hinge: the hinge loss.
    regulariser: LeCAM's, not weighted.
    lecam: running means of the logits after this step.
  """

  loss: Float[Array, '']
  hinge: Float[Array, '']
  regulariser: Float[Array, '']
  lecam: LecamState


def discriminator_loss(
  real: Float[Array, '*s'],
  fake: Float[Array, '*s'],
  lecam_state: LecamState,
  *,
  lecam_weight: float = 0.001,
  decay: float = 0.999,
) -> DiscriminatorLoss:
  """What the discriminator minimises beside `consistency`."""
  hinge = hinge_discriminator(real, fake)
  regulariser, state = lecam(lecam_state, real, fake, decay=decay)
  total = hinge + lecam_weight * regulariser
  return DiscriminatorLoss(total, hinge, regulariser, state)


def _wide(logits):
  return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
