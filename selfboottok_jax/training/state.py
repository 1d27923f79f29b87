"""The state of a training, and the train step that every task shares."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from selfboottok_jax.training import optim, sharding


@flax.struct.dataclass
class TrainState:
  """The arrays of a training that change, all of which a checkpoint holds.

  A group is a set of parameters with a loss and an optimiser of its own, such
  as a tokenizer or its discriminator. Dicts are keyed by group.

  Attributes:
    step: updates made so far.
    params: parameters by group. A group without a loss stays the same, bit for
      bit: the frozen part of a partly trained model.
    ema: running means of the parameters, of the groups that are used later.
    opt: optimiser state of each trained group.
    stats: statistics that change without a gradient (LeCAM means, latent
      statistics).
  """

  # Any: the same tree also carries shapes and shardings in place of arrays.
  step: Any
  params: dict[str, PyTree]
  ema: dict[str, PyTree]
  opt: dict[str, PyTree]
  stats: dict[str, PyTree]


@flax.struct.dataclass
class LossInputs:
  """Inputs of a loss, besides the parameters that it is differentiated by.

  Attributes:
    params: parameters of all groups, without a gradient. Groups earlier in the
      order have been updated in this step already.
    frozen: parameters of networks that are neither trained nor saved.
    batch: 'image' and 'label' of this step.
    stats: as in TrainState, with the changes that earlier groups made.
    carry: arrays handed on by the group before; {} for the first.
    step: updates made so far.
    rng: random key of this step and group.
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
  """Outputs of a loss besides its value.

  Attributes:
    metrics: scalars to log.
    stats: all statistics, changed or not.
    carry: arrays for the next group, which need not compute them again.
  """

  metrics: dict[str, Float[Array, '']]
  stats: dict[str, PyTree]
  carry: dict[str, Array]


# (parameters of its group, inputs) -> (scalar to minimise, outputs).
Loss = Callable[[PyTree, LossInputs], tuple[Float[Array, ''], LossOutputs]]


def init_state(
  params: dict[str, PyTree],
  stats: dict[str, PyTree],
  optimizers: Mapping[str, optim.Optimizer],
  ema_groups: tuple[str, ...],
) -> TrainState:
  """Returns the state before the first update.

  Args:
    params: initial parameters by group.
    stats: initial statistics.
    optimizers: optimisers of the trained groups.
    ema_groups: groups that have a running mean, which starts at `params`.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    # Copies, because the state is donated: one buffer cannot be given up twice.
    ema={group: jax.tree.map(jnp.copy, params[group]) for group in ema_groups},
    opt={
      group: optimizer.transform.init(params[group])
      for group, optimizer in optimizers.items()
    },
    stats=stats,
  )


def place_abstractly(state: TrainState, mesh: Mesh) -> TrainState:
  """Returns the shape, type and sharding of every leaf of a state.

  Moments and running means serve one update a step and no product, so every
  device has a share of its own of them. Parameters are split over the devices
  that gather them while computing.
  """
  place = functools.partial(sharding.place_abstractly, mesh=mesh)
  return TrainState(
    step=place(state.step),
    params=place(state.params),
    ema=place(state.ema, everywhere=True),
    opt=place(state.opt, everywhere=True),
    stats=place(state.stats),
  )


def start_mean(mean: PyTree, params: PyTree) -> PyTree:
  """Returns a running mean that starts anew, placed like the old `mean`.

  A copy in any case: the state is donated, one buffer cannot be given up twice.
  """
  return jax.tree.map(
    lambda old, new: jax.device_put(jnp.copy(new), old.sharding), mean, params
  )


def ema_decay(step: Int[Array, ''], limit: float) -> Float[Array, '']:
  """Returns the decay of running means, min(limit, (1 + n) / (10 + n)).

  It grows with the number n of updates, so that short runs do not average over
  their random start.
  """
  n = step.astype(jnp.float32)
  return jnp.minimum(limit, (1 + n) / (10 + n))


def make_train_step(
  losses: Mapping[str, Loss],
  optimizers: Mapping[str, optim.Optimizer],
  *,
  seed: int,
  ema_limit: float,
  accumulate: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Float[Array, '']]]]:
  """Makes the function step(state, frozen, batch) -> (state, metrics).

  Groups are updated one after the other in the order of `losses`, each given
  the newest parameters of the others.

  Args:
    losses: the loss of each trained group.
    optimizers: the optimiser of each trained group.
    seed: seed of all randomness in the step.
    ema_limit: largest decay of the running means, see `ema_decay`.
    accumulate: micro-batches that a batch is cut into, so that activations of
      one of them are in memory at a time. The gradient of a group is the mean
      of theirs, in float32, and there is one update. That is the gradient of
      the whole batch for a loss that is a mean over images. What couples the
      images of a batch sees a micro-batch instead: norms and deviations of a
      discriminator, means of logits, the mean assignment in the entropy of
      codes, adaptive weights. Statistics pass from one micro-batch to the next,
      so that they change `accumulate` times a step. Each has a random key of
      its own; metrics are means.
  """

  def step_fn(
    state: TrainState, frozen: PyTree, batch: dict[str, Array]
  ) -> tuple[TrainState, dict[str, Float[Array, '']]]:
    # Derived from the step, so a run that continues draws the same numbers, and
    # a checkpoint needs no random state.
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)
    params, opt, stats = dict(state.params), dict(state.opt), state.stats
    whole = sharding.gather_unstacked(frozen)
    metrics: dict[str, Float[Array, '']] = {}
    carry: dict[str, Array] = {}
    for index, (group, loss) in enumerate(losses.items()):
      inputs = LossInputs(
        params=sharding.gather_unstacked(params),
        frozen=whole,
        batch=batch,
        stats=stats,
        carry=carry,
        step=state.step,
        rng=jax.random.fold_in(step_key, index),
      )
      value, outputs, grads = _differentiate(loss, group, inputs, accumulate)
      params[group], opt[group], learning_rate = optim.update(
        optimizers[group], grads, opt[group], params[group], state.step
      )
      stats, carry = outputs.stats, outputs.carry
      metrics |= outputs.metrics
      # The first group's loss is that of the task, and is logged as 'loss'.
      metrics[f'{group}_loss' if index else 'loss'] = value
      # Before clipping, so that the log shows when it takes hold.
      metrics[f'{group}_grad_norm'] = optax.tree.norm(grads)
      metrics['learning_rate'] = learning_rate
    decay = ema_decay(state.step, ema_limit)
    ema = {
      group: jax.tree.map(
        # This form leaves a mean that equals the parameter exactly as it is.
        lambda mean, new: mean + (1 - decay) * (new - mean),
        mean,
        params[group],
      )
      for group, mean in state.ema.items()
    }
    new_state = TrainState(state.step + 1, params, ema, opt, stats)
    return new_state, metrics

  return step_fn


def _differentiate(
  loss: Loss, group: str, inputs: LossInputs, accumulate: int
) -> tuple[Float[Array, ''], LossOutputs, PyTree]:
  """Returns (value, outputs, gradient) of a loss in its group's parameters.

  With `accumulate` above 1 value and metrics are means over the micro-batches,
  and `carry` has the arrays of each on a new first axis: the next group takes
  them apart again.
  """
  trained = inputs.params[group]
  grad_fn = jax.value_and_grad(loss, has_aux=True)
  if accumulate == 1:
    (value, outputs), grads = grad_fn(trained, inputs)
    return value, outputs, sharding.split(grads)

  def add(
    total: tuple[PyTree, PyTree], part: tuple[Any, ...]
  ) -> tuple[tuple[PyTree, PyTree], tuple[Any, ...]]:
    (grads, stats), (index, batch, carry) = total, part
    (value, outputs), new = grad_fn(
      trained,
      dataclasses.replace(
        inputs,
        batch=batch,
        stats=stats,
        carry=carry,
        rng=jax.random.fold_in(inputs.rng, index),
      ),
    )
    grads = jax.tree.map(
      lambda mean, g: mean + g.astype(mean.dtype) / accumulate,
      grads,
      sharding.split(new),
    )
    return (grads, outputs.stats), (value, outputs.metrics, outputs.carry)

  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(
      leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)
    ),
    trained,
  )
  (grads, stats), (values, metrics, carry) = jax.lax.scan(
    add,
    (sharding.split(zeros), inputs.stats),
    (
      jnp.arange(accumulate),
      sharding.cut_batch(inputs.batch, accumulate),
      inputs.carry,
    ),
  )
  grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, trained)
  means = {name: jnp.mean(value) for name, value in metrics.items()}
  return jnp.mean(values), LossOutputs(means, stats, carry), grads
