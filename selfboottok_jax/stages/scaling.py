"""Stage 2 (Sec. 3.4): a larger local 2D aligner behind a frozen tokenizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from selfboottok_jax import errors, placement
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.stages import critic, initialization, tokenizer
from selfboottok_jax.stages import objective as objective_lib
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import state as state_lib

# The last layers of a block's two residual branches, by path.
RESIDUAL_OUTPUTS = ("['attn']['out']", "['mlp']['down']")
# Modules that decide the codes. Generators rely on them: they never retrain.
CONTRACT = ('encoder', 'quantizer_global')


class ScalingTask(tokenizer.TokenizerTask):
  """Eq. (4) again, differentiated in the `trainable` modules only.

  All other modules are carried in the state's 'base' group, which has no loss:
  they stay bit for bit as stage 1 left them, and are in every checkpoint.
  """

  def __init__(
    self,
    model: tokenizer_lib.Tokenizer,
    objective: objective_lib.Objective,
    networks: Mapping[str, Any],
    discriminator: critic.Critic | None,
    *,
    steps: int,
    trainable: tuple[str, ...],
  ):
    """Takes TokenizerTask's arguments; `trainable` names modules to train."""
    super().__init__(
      model,
      objective,
      networks,
      discriminator,
      steps=steps,
      trainable=trainable,
    )
    if self.model.share_codebooks and 'quantizer_local2d' in trainable:
      raise errors.ConfigError(
        'model.share_codebooks=True: local tokens have the codebook that '
        'generators rely on, and none of their own to train; set '
        '--config.trainable="(\'local2d\',)"'
      )
    broken = sorted(set(trainable) & set(CONTRACT))
    if broken:
      raise errors.ConfigError(
        f'trainable={",".join(trainable)} would change {", ".join(broken)}, '
        'which generators of this tokenizer rely on; leave it out'
      )
    self.trainable = trainable

  def init(self, rng: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Fresh parameters, split into 'tokenizer' (trained) and 'base'."""
    params, stats = super().init(rng)
    trained, base = tokenizer_lib.split_trainable(
      params['tokenizer'], self.trainable
    )
    return {**params, 'tokenizer': trained, 'base': base}, stats


def start_from(
  state: state_lib.TrainState,
  run: checkpointing.Run,
  optimizer: Mapping[str, PyTree],
) -> state_lib.TrainState:
  """Continues stage 1 in a fresh state of stage 2.

  The base is stage 1's running mean. Trained modules start from it too where
  they have kept their shape, and an aligner that is only deeper starts as the
  same function (`deepen`); one of another width starts fresh. The discriminator
  goes on with its optimiser, LeCAM's means and the statistics of its norms.
  """
  what = f'tokenizer={run.workdir}'
  stored = {**run.params.get('base', {}), **run.ema['tokenizer']}
  base = initialization.adopt(state.params['base'], stored, what=what)
  fresh = state.params['tokenizer']
  grown = 'local2d' in fresh and 'local2d' in stored
  if grown and can_deepen(fresh['local2d'], stored['local2d']):
    stored['local2d'] = deepen(fresh['local2d'], stored['local2d'])
  trained = initialization.adopt(
    fresh,
    stored,
    what=what,
    may_differ=tuple(fresh),
  )
  params = {**state.params, 'base': base, 'tokenizer': trained}
  opt, stats = dict(state.opt), dict(state.stats)
  if critic.GROUP in params and critic.GROUP in run.params:
    params[critic.GROUP] = initialization.adopt(
      params[critic.GROUP], run.params[critic.GROUP], what=what
    )
    opt[critic.GROUP] = _like(opt[critic.GROUP], optimizer[critic.GROUP])
    for name in stats:
      stats[name] = initialization.adopt(
        stats[name], run.stats[name], what=what
      )
  ema = {'tokenizer': state_lib.start_mean(state.ema['tokenizer'], trained)}
  return dataclasses.replace(
    state, params=params, opt=opt, stats=stats, ema=ema
  )


def can_deepen(fresh: PyTree, stored: PyTree) -> bool:
  """True if two aligners differ in nothing but the number of blocks."""
  structures: list[Any] = [jax.tree.structure(t) for t in (fresh, stored)]
  if structures[0] != structures[1]:
    return False
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(fresh),
    jax.tree.leaves(stored),
    strict=True,
  )
  return all(
    new.shape[1:] == old.shape[1:] and new.shape[0] > old.shape[0]
    if _in_blocks(path)
    else new.shape == old.shape
    for (path, new), old in pairs
  )


def deepen(fresh: PyTree, stored: PyTree) -> PyTree:
  """Appends fresh blocks to the stored aligner without changing its function.

  A block adds to the residual stream through two output matrices only. In the
  new blocks these start at zero, everything else as initialised.
  """

  def join(path: Any, new: jax.Array, old: jax.Array) -> jax.Array:
    if not _in_blocks(path):
      return old
    added = new[old.shape[0] :]
    names = jax.tree_util.keystr(path)
    if any(part in names for part in RESIDUAL_OUTPUTS):
      added = jax.numpy.zeros_like(added)
    return jax.numpy.concatenate([jax.device_put(old, added.sharding), added])

  return jax.tree_util.tree_map_with_path(join, fresh, stored)


def _in_blocks(path: Any) -> bool:
  """True for a leaf with a leading layer axis."""
  return placement.STACKED in jax.tree_util.keystr(path)


def _like(fresh: PyTree, stored: PyTree) -> PyTree:
  """Puts the stored leaves into the containers and placement of the fresh.

  A checkpoint that is read without its training has plain dicts and lists in
  place of optax's named tuples; the order of the leaves is the same.
  """
  leaves = jax.tree.leaves(stored)
  placed = [
    jax.device_put(leaf, like.sharding)
    for leaf, like in zip(leaves, jax.tree.leaves(fresh), strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(fresh), placed)
