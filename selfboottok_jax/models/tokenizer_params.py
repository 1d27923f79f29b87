"""A tokenizer's parameters: what is trained, what stays, what is served."""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from selfboottok_jax import errors

# Heads that carry tokens to a teacher's width; they serve the loss alone.
PROJECTOR = 'project_'


def model_params(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """The tokenizer's own parameters, without the heads to the teachers."""
  return {k: v for k, v in params.items() if not k.startswith(PROJECTOR)}


def split_trainable(
  params: Mapping[str, PyTree], trainable: tuple[str, ...]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Cuts a tokenizer's parameters into (trained, base) by module name."""
  unknown = sorted(set(trainable) - set(params))
  if unknown or not trainable:
    raise errors.ConfigError(
      f'trainable={",".join(trainable) or "()"}; the model has no '
      f'{", ".join(unknown) or "empty choice"}; wanted some of '
      f'{", ".join(sorted(params))}'
    )
  trained = {k: v for k, v in params.items() if k in trainable}
  base = {k: v for k, v in params.items() if k not in trainable}
  return trained, base


def served_params(
  params: Mapping[str, Any], ema: Mapping[str, Any]
) -> dict[str, PyTree]:
  """What is loaded for use: running means over whatever was never trained."""
  return model_params({**params.get('base', {}), **ema['tokenizer']})


def encoding_params(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """The modules that a tokenizer's `encode` reads."""
  return {k: params[k] for k in ('encoder', 'quantizer_global')}


def adopt(
  fresh: Mapping[str, PyTree],
  stored: Mapping[str, PyTree],
  *,
  what: str,
  may_differ: tuple[str, ...] = (),
) -> dict[str, PyTree]:
  """Takes the stored modules over, placed like the fresh ones.

  Args:
    fresh: parameters by module, as initialised.
    stored: parameters by module, from another run.
    what: names the other run in errors.
    may_differ: modules that stay fresh when their shapes are others.

  Returns:
    Parameters by module.

  Raises:
    CheckpointError: a module is missing there, or shaped otherwise.
  """
  taken, misfits = {}, []
  for name, module in fresh.items():
    if name in stored and _shapes(module) == _shapes(stored[name]):
      taken[name] = jax.tree.map(
        lambda new, old: jax.device_put(old, new.sharding),
        module,
        stored[name],
      )
    elif name in may_differ:
      taken[name] = module
    else:
      misfits.append(name)
  if misfits:
    raise errors.CheckpointError(
      f'{what} does not fit: {", ".join(misfits)} absent or of other shapes '
      'there; wanted a run with the same model.*, loss.*, networks.* and '
      'discriminator.*'
    )
  return taken


def _shapes(tree: PyTree):
  return jax.tree.map(lambda leaf: leaf.shape, tree)
