"""A trained tokenizer as an object that encodes and decodes."""

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PyTree

from selfboottok_jax import pixels, pretrained, sizes
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.pretrained import autoencoders, contract
from selfboottok_jax.training import checkpointing


class ImageTokenizer:
  """A trained tokenizer, with its EMA weights unless others were asked for.

  Attributes:
    model: the module.
    params: its parameters.
    image_size: side in pixels of the images that it reads and makes, or
      (height, width) if they are no squares.
    patch_size: side in pixels of the patches that it makes images of.
    num_tokens: number of codes per image, k in shapes.
    token_dim: channels of a code, e in shapes.
    latent_dim: channels of a latent; equals `token_dim`, as a code is one
      latent here.
    image_encoder: its encoding half, for the generator that models its codes.
    fingerprint: hash of everything that `encode` depends on. A generator works
      with every tokenizer of the same fingerprint, and stage 2 keeps it.
    step: number of updates made in training.
    config: configuration of the training.
    heads: parameters that carried tokens to a teacher's width in training, by
      the name of the loss term.
  """

  def __init__(
    self,
    model: tokenizer_lib.Tokenizer,
    params: PyTree,
    *,
    step: int = 0,
    config: dict[str, Any] | None = None,
    heads: Mapping[str, PyTree] | None = None,
  ):
    """Wraps a module and its parameters."""
    self.model, self.params = model, jax.device_put(params)
    self.image_size, self.patch_size = model.image_size, model.patch_size
    self.num_tokens, self.token_dim = model.num_tokens, model.token_dim
    self.latent_dim = model.token_dim
    self.image_encoder = image_encoder_of(model, self.params)
    self.fingerprint = fingerprint(model, params)
    self.step, self.config = step, config or {}
    self.heads = dict(heads or {})
    # Parameters are an argument of the compiled functions. Closed over, they
    # would become constants of every program.
    self._encode = jax.jit(functools.partial(model.apply, method='encode'))
    self._decode = jax.jit(
      functools.partial(model.apply, method='decode'),
      # The number of groups decides which modules run, so it cannot be traced.
      static_argnames='num_groups',
    )

  def encode(
    self, images: Num[Array, 'b h w 3'] | Num[np.ndarray, 'b h w 3']
  ) -> Float[Array, 'b k e']:
    """Encodes images into the codes that a generator models.

    Args:
      images: uint8 in 0 to 255, or float in [-1, 1]; of `image_size`.

    Returns:
      float32 codes [b, num_tokens, token_dim].

    Raises:
      UserError: images of another shape, type or range.
    """
    return self._encode(
      {'params': self.params}, pixels.as_images(images, self.image_size)
    )

  def decode(
    self,
    codes: Float[Array, 'b k e'] | Float[np.ndarray, 'b k e'],
    *,
    num_groups: int | None = None,
  ) -> Float[Array, 'b h w 3']:
    """Decodes codes into float32 images, clipped to [-1, 1].

    Args:
      codes: codes that `encode` or a generator made.
      num_groups: number of token groups to decode from. 1 is the global tokens,
        2 adds the local 1D tokens, 3 and None use all. Fewer than 3 suit models
        trained with `model.group_dropout`.

    Raises:
      UserError: codes of another shape, or a group number out of range.
    """
    codes = pixels.as_codes(codes, self.num_tokens, self.token_dim)
    images = self._decode({'params': self.params}, codes, num_groups=num_groups)
    return jnp.clip(images, -1.0, 1.0)

  def decode_with(
    self, params: PyTree, codes: Float[Array, 'b k e']
  ) -> Float[Array, 'b h w 3']:
    """Decodes with the given parameters, without clipping; can be jitted."""
    model: Any = self.model
    return model.apply({'params': params}, codes, method='decode')


# A trained tokenizer, or a released 2D autoencoder in its place.
Tokenizer: TypeAlias = ImageTokenizer | autoencoders.ImageAutoencoder


def load_tokenizer(
  workdir: str | os.PathLike[str],
  *,
  image_size: Any = 256,
  step: int | None = None,
  ema: bool = True,
) -> Tokenizer:
  """Loads a tokenizer (stage 1 or 2) from the workdir of its training.

  Args:
    workdir: the folder, which may be gs://BUCKET/NAME. It may also name a
      released 2D autoencoder: 'sdvae' or 'vavae'. 'sdvae:SOURCE' reads its
      weights from SOURCE instead of the place where they are published.
    image_size: pixels a side, or (height, width), of the images of such an
      autoencoder. A run has the size that it was trained on.
    step: checkpoint of a run to load, the newest by default.
    ema: False loads the parameters themselves, not their running means.

  Raises:
    CheckpointError: the folder holds no tokenizer run, or no such step.
  """
  if autoencoders.is_autoencoder(str(workdir)):
    size = sizes.canonical(image_size, 'image_size')
    return pretrained.load_autoencoder(str(workdir), size)
  run = checkpointing.read_run(
    str(workdir),
    what='tokenizer workdir',
    task='tokenizer',
    step=step,
    ema=ema,
  )
  return tokenizer_of(run)


def tokenizer_of(run: checkpointing.Run) -> ImageTokenizer:
  """Builds a tokenizer from a run that was read already."""
  model = tokenizer_lib.Tokenizer(
    image_size=sizes.canonical(run.config['data']['image_size']),
    **run.config['model'],
  )
  params = tokenizer_lib.served_params(run.params, run.ema)
  prefix = tokenizer_lib.PROJECTOR
  heads = {
    name.removeprefix(prefix): head
    for name, head in run.ema['tokenizer'].items()
    if name.startswith(prefix)
  }
  return ImageTokenizer(
    model, params, step=run.step, config=run.config, heads=heads
  )


def fingerprint(model: tokenizer_lib.Tokenizer, params: PyTree) -> str:
  """Hashes everything that `encode` depends on, as a SHA-256 hex digest.

  It covers the encoder, the global codebooks and how codes are assigned.
  """
  # Fields of the decoding side are left out: a scaled local aligner must keep
  # the fingerprint, so that generators still accept the tokenizer. Stored runs
  # hold these digests; another order of the fields would orphan them.
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
  read = tokenizer_lib.encoding_params(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(read):
    # The path too: two leaves of equal bytes may not change places.
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(leaf).tobytes())
  return digest.hexdigest()


def image_encoder_of(
  model: tokenizer_lib.Tokenizer, params: PyTree
) -> contract.ImageEncoder:
  """Returns the encoding half of a tokenizer.

  `params` are all parameters of the model; only those of the encoding half are
  kept.
  """
  module: Any = model

  def encode(params: PyTree, images: Array) -> Array:
    return module.apply({'params': params}, images, method='encode')

  return contract.ImageEncoder(
    encode,
    tokenizer_lib.encoding_params(params),
    model.num_tokens,
    model.token_dim,
    model.image_size,
  )
