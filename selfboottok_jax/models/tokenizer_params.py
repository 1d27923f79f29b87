"""A tokenizer's parameters: what is trained, what stays, what is served."""

from collections.abc import Mapping
from typing import Any

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
