"""Stage 2 (Sec. 3.4): a larger local 2D aligner behind a frozen tokenizer."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from selfboottok_jax import errors
from selfboottok_jax.models import tokenizer_params
from selfboottok_jax.stages import tokenizer
from selfboottok_jax.training import checkpointing, sharding
from selfboottok_jax.training import state as state_lib

# What a block adds to the residual stream, by path.
RESIDUAL_OUTPUTS = ("['attn']['out']", "['mlp']['down']")
# Their values are the contract with the generator: it never retrains.
CONTRACT = ('encoder', 'quantizer_global')


class ScalingTask(tokenizer.TokenizerTask):
  """Eq. (4) again, differentiated in the `trainable` modules only.

  All else is carried in the state's 'base' group, which no loss names: bit for
  bit what stage 1 left, and part of every checkpoint.
  """

  def __init__(self, *args: Any, trainable: tuple[str, ...], **kwargs: Any):
    """Takes TokenizerTask's arguments; `trainable` are the modules to train."""
    super().__init__(*args, trainable=trainable, **kwargs)
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
    """Fresh parameters, cut into 'tokenizer' (trained) and 'base'."""
    params, stats = super().init(rng)
    trained, base = tokenizer_params.split_trainable(
      params['tokenizer'], self.trainable
    )
    return {**params, 'tokenizer': trained, 'base': base}, stats


def start_from(
  state: state_lib.TrainState,
  run: checkpointing.Run,
  optimizer: Mapping[str, PyTree],
) -> state_lib.TrainState:
  """A fresh state that continues stage 1.

  The base is stage 1's running mean. Trained modules start from it too where
  they have kept their shape, and an aligner that is only deeper starts as the
  same function (`deepen`); one of another width starts fresh. The discriminator
  goes on with its optimiser, LeCAM's means and the statistics of its norms.
  """
  what = f'tokenizer={run.workdir}'
  stored = {**run.params.get('base', {}), **run.ema['tokenizer']}
  base = tokenizer_params.adopt(state.params['base'], stored, what=what)
  fresh = state.params['tokenizer']
  grown = 'local2d' in fresh and 'local2d' in stored
  if grown and can_deepen(fresh['local2d'], stored['local2d']):
    stored['local2d'] = deepen(fresh['local2d'], stored['local2d'])
  trained = tokenizer_params.adopt(
    fresh,
    stored,
    what=what,
    may_differ=tuple(fresh),
  )
  params = {**state.params, 'base': base, 'tokenizer': trained}
  opt, stats = dict(state.opt), dict(state.stats)
  if 'discriminator' in params and 'discriminator' in run.params:
    params['discriminator'] = tokenizer_params.adopt(
      params['discriminator'], run.params['discriminator'], what=what
    )
    opt['discriminator'] = _like(
      opt['discriminator'], optimizer['discriminator']
    )
    for name in stats:
      stats[name] = tokenizer_params.adopt(
        stats[name], run.stats[name], what=what
      )
  ema = {'tokenizer': jax.tree.map(jax.numpy.copy, trained)}
  return state.replace(params=params, opt=opt, stats=stats, ema=ema)


def can_deepen(fresh: PyTree, stored: PyTree) -> bool:
  """Whether two aligners differ in nothing but the number of blocks."""
  if jax.tree.structure(fresh) != jax.tree.structure(stored):
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
  """The stored aligner with further blocks, which change nothing at first.

  What a new block adds to the stream passes through its two output matrices;
  they start at zero, all else of the block as initialised.
  """

  def join(path, new, old):
    if not _in_blocks(path):
      return old
    added = new[old.shape[0] :]
    names = jax.tree_util.keystr(path)
    if any(part in names for part in RESIDUAL_OUTPUTS):
      added = jax.numpy.zeros_like(added)
    return jax.numpy.concatenate([jax.device_put(old, added.sharding), added])

  return jax.tree_util.tree_map_with_path(join, fresh, stored)


def _in_blocks(path) -> bool:
  return sharding.STACKED in jax.tree_util.keystr(path)


def _like(fresh: PyTree, stored: PyTree) -> PyTree:
  """The stored leaves in the containers and on the devices of the fresh."""
  leaves = jax.tree.leaves(stored)
  placed = [
    jax.device_put(leaf, like.sharding)
    for leaf, like in zip(leaves, jax.tree.leaves(fresh), strict=True)
  ]
  return jax.tree.unflatten(jax.tree.structure(fresh), placed)
