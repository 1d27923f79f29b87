"""Initial states from another run, or with an encoder from DINOv2.

DINOv2 without registers is the paper's stabiliser of stage 1. Its weights are
resampled once to the patches and the grid of the model. They belong to a
network on ImageNet-normalised images, while the encoder sees [-1, 1]: SoftVQ's
code does the same.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from selfboottok_jax import errors, sizes
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.models import transformer
from selfboottok_jax.pretrained import resample, vit
from selfboottok_jax.training import state as state_lib

# Modules that no vision transformer has; they stay as initialised.
FRESH = ('latent_queries', 'to_code')
# Initial gain of the residual branches in DINOv2's own training.
LAYER_SCALE = 1e-5
# Position table and patches of the published DINOv2.
GRID, PATCH_SIZE = (37, 37), 14


def adopt(
  fresh: Mapping[str, PyTree],
  stored: Mapping[str, PyTree],
  *,
  what: str,
  may_differ: Collection[str] = (),
) -> dict[str, PyTree]:
  """Takes modules over from another run, placed like the fresh ones.

  Args:
    fresh: parameters by module, as initialised.
    stored: parameters by module, from another run.
    what: names the other run in errors.
    may_differ: modules that stay fresh where the other run lacks them or has
      them in other shapes.

  Returns:
    Parameters by module.

  Raises:
    CheckpointError: any other module is missing there or has other shapes.
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


def fine_tune(
  state: state_lib.TrainState,
  group: str,
  stored: Mapping[str, PyTree],
  workdir: str,
  may_differ: Collection[str] = (),
) -> state_lib.TrainState:
  """Takes a group's parameters over from another run.

  Optimiser moments start fresh, and the running mean as a copy. Arguments are
  those of `adopt`; `workdir` is the other run's.
  """
  taken = adopt(
    state.params[group],
    stored,
    what=f'init_from={workdir}',
    may_differ=may_differ,
  )
  return dataclasses.replace(
    state,
    params={**state.params, group: taken},
    ema={**state.ema, group: state_lib.start_mean(state.ema[group], taken)},
  )


def check_gains(model: tokenizer_lib.Tokenizer, spec: str) -> None:
  """Raises ConfigError if the model's blocks have no gains to take over."""
  if not model.layer_scale:
    raise errors.ConfigError(
      f'encoder_from={spec} with model.layer_scale=0, but its blocks have '
      f'gains; set --config.model.layer_scale={LAYER_SCALE}, or '
      '--config.encoder_from= to start from scratch'
    )


def check_sizes(
  model: tokenizer_lib.Tokenizer, network: vit.Vit, spec: str
) -> None:
  """Raises ConfigError unless the encoder has the transformer's sizes."""
  ours = {
    'model.encoder_width': (model.encoder_width, network.width),
    'model.encoder_depth': (model.encoder_depth, network.depth),
    'model.head_dim': (model.head_dim, network.width // network.heads),
    'model.mlp_ratio': (model.mlp_ratio, network.hidden / network.width),
  }
  wrong = [
    f'{name}={given}, wanted {wanted}'
    for name, (given, wanted) in ours.items()
    if given != wanted
  ]
  # A class token, gains and the exact GELU are built in; registers are not.
  kind = (network.cls, network.layer_scale, network.registers, network.gelu)
  if kind != (True, True, 0, 'exact'):
    wrong.append(
      'it is no DINOv2 without registers, wanted one such as dinov2_b'
    )
  if wrong:
    raise errors.ConfigError(
      f'the encoder cannot start from encoder_from={spec}: '
      f'{"; ".join(wrong)}; change these, or set --config.encoder_from= to '
      'start from scratch'
    )


def encoder_params(
  network: vit.Vit, params: PyTree, grid: sizes.Size, patch_size: int
) -> dict[str, PyTree]:
  """Renames and resamples a transformer's parameters for `models.encoder`.

  Args:
    network: the transformer as it was trained; one that was resampled before
      would be resampled twice, which is not the same.
    params: its parameters, on the host or on devices.
    grid: rows and columns of the encoder's patches, or one number for both.
    patch_size: of the encoder.

  Returns:
    Arrays on the host for all modules but those in `FRESH`.
  """
  params = jax.device_get(params)
  stacks = [
    params[transformer.segment_name(begin)]
    for begin, _ in transformer.segments(network.depth, network.taps)
  ]
  p, width = network.patch_size, network.width
  embed = params['patch_embed']
  kernel = resample.resize_patch_kernel(
    embed['kernel'].reshape(p, p, 3, width), patch_size
  )
  # The grid shrinks: without antialiasing most rows would count for nothing.
  positions = resample.resize_positions(
    params['positions'][0], network.grid, sizes.pair(grid), antialias=True
  )
  return {
    'patch_embed': {'kernel': kernel.reshape(-1, width), 'bias': embed['bias']},
    'patch_positions': positions[None],
    'cls': params['cls'],
    'blocks': jax.tree.map(lambda *leaves: np.concatenate(leaves), *stacks),
    'norm': params['norm'],
  }


def start_encoder(
  state: state_lib.TrainState,
  model: tokenizer_lib.Tokenizer,
  network: vit.Vit,
  params: Mapping[str, Any],
  spec: str,
) -> state_lib.TrainState:
  """Replaces the encoder of a fresh state by `network`.

  Arrays are placed like the fresh ones; the running mean starts as a copy.
  Modules that `network` lacks stay fresh.

  Raises:
    ConfigError: the model's encoder is of other sizes, see `check_sizes`.
  """
  check_sizes(model, network, spec)
  grid = sizes.grid(model.image_size, model.patch_size)
  tokenizer = state.params['tokenizer']
  encoder = adopt(
    tokenizer['encoder'],
    # From the host: one device's arrays cannot move to a mesh of several hosts.
    encoder_params(network, params, grid, model.patch_size),
    what=f'encoder_from={spec}',
    may_differ=FRESH,
  )
  tokenizer = {**tokenizer, 'encoder': encoder}
  mean = state_lib.start_mean(state.ema['tokenizer'], tokenizer)
  return dataclasses.replace(
    state,
    params={**state.params, 'tokenizer': tokenizer},
    ema={**state.ema, 'tokenizer': mean},
  )


def _shapes(tree: PyTree) -> PyTree:
  return jax.tree.map(lambda leaf: leaf.shape, tree)
