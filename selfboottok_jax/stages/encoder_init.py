"""The encoder's start from DINOv2 without registers, the paper's stabiliser.

Its weights are resampled here, once, to the patches and the grid of the model.
They are those of a network on ImageNet-normalised images, while the encoder
sees [-1, 1]: so does the reference.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from selfboottok_jax import errors
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.models import tokenizer_params, transformer
from selfboottok_jax.pretrained import resample, vit
from selfboottok_jax.training import state as state_lib

# What no vision transformer has; they stay as initialised.
FRESH = ('latent_queries', 'to_code')
# Of DINOv2's own training.
LAYER_SCALE = 1e-5
GRID, PATCH_SIZE = (37, 37), 14


def check_gains(model: tokenizer_lib.Tokenizer, spec: str) -> None:
  """ConfigError for a model whose blocks have no gains to take over."""
  if not model.layer_scale:
    raise errors.ConfigError(
      f'encoder_from={spec} with model.layer_scale=0, but its blocks have '
      f'gains; set --config.model.layer_scale={LAYER_SCALE}, or '
      '--config.encoder_from= to start from scratch'
    )


def check_sizes(
  model: tokenizer_lib.Tokenizer, network: vit.Vit, spec: str
) -> None:
  """ConfigError unless the encoder is a transformer of the same sizes."""
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
  network: vit.Vit, params: PyTree, side: int, patch_size: int
) -> dict[str, PyTree]:
  """A transformer's parameters under the names of `models.encoder`.

  Args:
    network: what the parameters are of, as trained: resampling twice is not
      resampling once.
    params: on the host or on devices.
    side: rows and columns of patches that the encoder has.
    patch_size: of the encoder.

  Returns:
    Arrays on the host, for all but what `FRESH` names.
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
    params['positions'][0], network.grid, (side, side), antialias=True
  )
  return {
    'patch_embed': {'kernel': kernel.reshape(-1, width), 'bias': embed['bias']},
    'patch_positions': positions[None],
    'cls': params['cls'],
    'blocks': jax.tree.map(lambda *leaves: np.concatenate(leaves), *stacks),
    'norm': params['norm'],
  }


def start(
  state: state_lib.TrainState,
  model: tokenizer_lib.Tokenizer,
  network: vit.Vit,
  params: Mapping[str, Any],
  spec: str,
) -> state_lib.TrainState:
  """A fresh state whose encoder is `network`, but for what that has not.

  Arrays are placed like the fresh ones; the running mean starts as a copy.

  Raises:
    ConfigError: the model's encoder is of other sizes, see `check_sizes`.
  """
  check_sizes(model, network, spec)
  side = model.image_size // model.patch_size
  tokenizer = state.params['tokenizer']
  encoder = tokenizer_params.adopt(
    tokenizer['encoder'],
    # Of the host: a device's could not be placed on a mesh of several hosts.
    encoder_params(network, params, side, model.patch_size),
    what=f'encoder_from={spec}',
    may_differ=FRESH,
  )
  tokenizer = {**tokenizer, 'encoder': encoder}
  return state.replace(
    params={**state.params, 'tokenizer': tokenizer},
    ema={**state.ema, 'tokenizer': jax.tree.map(jnp.copy, tokenizer)},
  )
