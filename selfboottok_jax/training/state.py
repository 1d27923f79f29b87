"""The state of a training, and the one train step of every task."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from selfboottok_jax.training import optim


@flax.struct.dataclass
class TrainState:
  """Everything a checkpoint holds; dicts are keyed by group.

  Attributes:
    step: updates made so far.
    params: parameters by group. A group without a loss is carried along
      untouched, bit for bit: the frozen part of a partly trained model.
    ema: running means of the parameters of the groups that are served.
    opt: optimiser state of each trained group.
    stats: what changes without a gradient (LeCAM means, latent statistics).
  """

  # Any: the same tree also carries shapes and shardings in place of arrays.
  step: Any
  params: dict[str, PyTree]
  ema: dict[str, PyTree]
  opt: dict[str, PyTree]
  stats: dict[str, PyTree]


@flax.struct.dataclass
class LossInputs:
  """What a loss may read besides the parameters it is differentiated in.

  Attributes:
    params: the parameters of all groups.
    frozen: parameters of networks that are never trained nor saved.
    batch: 'image' and 'label' of this step.
    stats: as in TrainState, with the changes of earlier groups.
    carry: what the group before handed on; {} for the first.
    step: updates made so far.
    rng: this step's key for this group.
  """

  params: dict[str, PyTree]
  frozen: PyTree
  batch: dict[str, Array]
  stats: dict[str, PyTree]
  carry: dict[str, Array]
  step: Int[Array, '']
  rng: Any


@flax.struct.dataclass
class LossOutputs:
  """What a loss hands back besides its value."""

  metrics: dict[str, Float[Array, '']]
  stats: dict[str, PyTree]
  carry: dict[str, Array]


Loss = Callable[[PyTree, LossInputs], tuple[Float[Array, ''], LossOutputs]]


def init_state(
  params: dict[str, PyTree],
  stats: dict[str, PyTree],
  optimizers: Mapping[str, optim.Optimizer],
  ema_groups: tuple[str, ...],
) -> TrainState:
  """A state at step 0; each running mean starts as a copy."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema={group: jax.tree.map(jnp.copy, params[group]) for group in ema_groups},
    opt={
      group: optimizer.transform.init(params[group])
      for group, optimizer in optimizers.items()
    },
    stats=stats,
  )


def ema_decay(step: Int[Array, ''], limit: float) -> Float[Array, '']:
  """min(limit, (1 + n) / (10 + n)) after n updates: short runs forget fast."""
  n = step.astype(jnp.float32)
  return jnp.minimum(limit, (1 + n) / (10 + n))


def make_train_step(
  losses: Mapping[str, Loss],
  optimizers: Mapping[str, optim.Optimizer],
  *,
  seed: int,
  ema_limit: float,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, '']]]]:
  """Returns step(state, frozen, batch) -> (state, metrics).

  Groups are updated in the order of `losses`, each against the newest
  parameters of the others. Randomness is fold_in(key(seed), step), so nothing
  random needs to be saved.
  """

  def step_fn(state: TrainState, frozen: PyTree, batch: dict[str, Array]):
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    params, opt, stats = dict(state.params), dict(state.opt), state.stats
    metrics, carry = {}, {}
    for index, (group, loss) in enumerate(losses.items()):
      inputs = LossInputs(
        params=params,
        frozen=frozen,
        batch=batch,
        stats=stats,
        carry=carry,
        step=state.step,
        rng=jax.random.fold_in(step_key, index),
      )
      grad_fn = jax.value_and_grad(loss, has_aux=True)
      (value, outputs), grads = grad_fn(params[group], inputs)
      params[group], opt[group], learning_rate = optim.update(
        optimizers[group], grads, opt[group], params[group], state.step
      )
      stats, carry = outputs.stats, outputs.carry
      metrics |= outputs.metrics
      # The first group's is the loss of the task.
      metrics[f'{group}_loss' if index else 'loss'] = value
      metrics[f'{group}_grad_norm'] = optax.tree.norm(grads)
      metrics['learning_rate'] = learning_rate
    decay = ema_decay(state.step, ema_limit)
    ema = {
      group: jax.tree.map(
        lambda mean, new: mean + (1 - decay) * (new - mean),
        mean,
        params[group],
      )
      for group, mean in state.ema.items()
    }
    new_state = TrainState(state.step + 1, params, ema, opt, stats)
    return new_state, metrics

  return step_fn
