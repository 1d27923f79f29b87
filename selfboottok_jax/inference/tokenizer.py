"""A trained tokenizer as an object: encode, decode."""

import functools
import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from selfboottok_jax import errors
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.tasks import generator as generator_task
from selfboottok_jax.tasks import parts
from selfboottok_jax.training import checkpointing


class ImageTokenizer:
  """A trained tokenizer, with its EMA weights.

  Attributes:
    model: the module.
    params: its parameters.
    image_size: side of the images that it reads and makes.
    num_tokens: k.
    token_dim: e.
    fingerprint: of all that `encode` depends on. A generator works with every
      tokenizer of one fingerprint: stage 2 does not change it.
    step: updates made in training.
    config: of the training.
  """

  def __init__(
    self,
    model: tokenizer_lib.Tokenizer,
    params: PyTree,
    *,
    step: int = 0,
    config: dict[str, Any] | None = None,
  ):
    """Wraps a module and its parameters."""
    self.model, self.params = model, jax.device_put(params)
    self.image_size = model.image_size
    self.num_tokens, self.token_dim = model.num_tokens, model.token_dim
    self.fingerprint = fingerprint(model, params)
    self.step, self.config = step, config or {}
    self._encode = jax.jit(functools.partial(model.apply, method='encode'))
    self._decode = jax.jit(
      functools.partial(model.apply, method='decode'),
      static_argnames='num_groups',
    )

  def encode(
    self, images: Num[Array, 'b h w 3'] | Num[np.ndarray, 'b h w 3']
  ) -> Float[Array, 'b k e']:
    """Codes of images, the tensor that a generator models.

    Args:
      images: uint8, or float in [-1, 1]; square, of `image_size`.

    Returns:
      float32 codes.
    """
    return self._encode({'params': self.params}, self._check(images))

  def decode(
    self,
    codes: Float[Array, 'b k e'] | Float[np.ndarray, 'b k e'],
    *,
    num_groups: int | None = None,
  ) -> Float[Array, 'b h w 3']:
    """Images in [-1, 1] from codes.

    `num_groups` decodes from the first so many token groups (1: global, 2: and
    local 1D, 3: all); for models trained with `model.group_dropout`.
    """
    codes = jnp.asarray(codes, jnp.float32)
    wanted = (self.num_tokens, self.token_dim)
    if codes.ndim != 3 or codes.shape[1:] != wanted:
      raise errors.UserError(
        f'codes of shape {codes.shape}; wanted [b, {wanted[0]}, {wanted[1]}]'
      )
    if num_groups is not None and not 1 <= num_groups <= len(self.model.groups):
      raise errors.UserError(
        f'num_groups={num_groups}; wanted 1 to {len(self.model.groups)}'
      )
    images = self._decode({'params': self.params}, codes, num_groups=num_groups)
    return jnp.clip(images, -1.0, 1.0)

  def _check(self, images) -> Float[Array, 'b h w 3']:
    wanted = (self.image_size, self.image_size, 3)
    if np.ndim(images) != 4 or np.shape(images)[1:] != wanted:
      raise errors.UserError(
        f'images of shape {np.shape(images)}; wanted [b, {wanted[0]}, '
        f'{wanted[1]}, 3]; crop and resize them first'
      )
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8:
      return images.astype(jnp.float32) / 127.5 - 1
    if not jnp.issubdtype(images.dtype, jnp.floating):
      raise errors.UserError(
        f'images of type {images.dtype}; wanted uint8, or float in [-1, 1]'
      )
    # Not "> 1.001": that would let NaN through.
    if images.size and not float(jnp.max(jnp.abs(images))) <= 1.001:
      raise errors.UserError(
        f'float images from {float(images.min()):.3g} to '
        f'{float(images.max()):.3g}; wanted [-1, 1]; give uint8, or rescale'
      )
    return images.astype(jnp.float32)


def load_tokenizer(workdir: str | os.PathLike[str]) -> ImageTokenizer:
  """Loads a tokenizer (stage 1 or 2) from the workdir of its training."""
  run = checkpointing.read_run(
    str(workdir), what='tokenizer workdir', task='tokenizer'
  )
  return tokenizer_of(run)


def tokenizer_of(run: checkpointing.Run) -> ImageTokenizer:
  """The tokenizer of a run that was read already."""
  model = tokenizer_lib.Tokenizer(
    image_size=run.config['data']['image_size'], **run.config['model']
  )
  params = parts.served_params(run.params, run.ema)
  return ImageTokenizer(model, params, step=run.step, config=run.config)


def fingerprint(model: tokenizer_lib.Tokenizer, params: PyTree) -> str:
  """SHA-256 of the encoder, the global codebooks and how they are used."""
  fields = (
    'image_size',
    'patch_size',
    'head_dim',
    'assignment',
    'tau',
    'unit_rms',
    'bootstrap_from',
  )
  digest = hashlib.sha256(
    json.dumps({name: getattr(model, name) for name in fields}).encode()
  )
  encoding = generator_task.encoding_params(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(encoding):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()
