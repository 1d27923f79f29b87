"""Trained runs as objects: encode, decode, sample."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PyTree

from selfboottok_jax import errors
from selfboottok_jax.flow import guidance
from selfboottok_jax.flow import noise as noise_lib
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.models import sit
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.tasks import generator as generator_task
from selfboottok_jax.tasks import parts
from selfboottok_jax.training import checkpointing

# At one sample a device XLA picks other kernels; from two on, the same sample
# in another batch differs by rounding at most.
MIN_BATCH = 2


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


class ImageGenerator:
  """A trained generator and the tokenizer that decodes for it.

  Attributes:
    tokenizer: decodes; its local aligner may be any scaled one.
    num_classes: labels are 0 to num_classes - 1.
    class_names: of the training data.
    step: updates made in training.
    config: of the training.
  """

  def __init__(
    self,
    model: sit.SiT,
    params: PyTree,
    latents: PyTree,
    tokenizer: ImageTokenizer,
    *,
    path: str = 'linear',
    class_names: Sequence[str] = (),
    step: int = 0,
    config: dict[str, Any] | None = None,
  ):
    """Wraps modules and parameters; `latents` undoes the normalisation."""
    self.model = model
    self.params, self.latents = jax.device_put((params, latents))
    self.tokenizer = tokenizer
    self.num_classes = model.num_classes
    self.class_names = tuple(class_names)
    self.step, self.config = step, config or {}
    self._path = path_lib.PATHS[path]
    self._sample = jax.jit(
      self._sample_codes,
      static_argnames=('sampler', 'num_steps', 'scale', 'interval'),
    )

  def sample(
    self,
    labels: Sequence[int] | Int[np.ndarray, ' b'] | Int[Array, ' b'],
    *,
    seed: int = 0,
    sampler: str = 'sde',
    num_steps: int = 250,
    guidance_scale: float = 2.3,
    guidance_interval: tuple[float, float] = (0.0, 0.85),
    first_index: int = 0,
  ) -> Float[Array, 'b h w 3']:
    """Images in [-1, 1] of the given classes.

    Args:
      labels: classes, one per image.
      seed: of the noise.
      sampler: 'sde', 'ode' or 'heun'.
      num_steps: steps from noise to data.
      guidance_scale: 1 is the conditional model.
      guidance_interval: (low, high) in t, where 1 is noise.
      first_index: index of the first sample; sample i depends on the seed, its
        label and its index alone, whatever the batch.

    Returns:
      float32 images [b, h, w, 3].
    """
    codes = self.sample_codes(
      labels,
      seed=seed,
      sampler=sampler,
      num_steps=num_steps,
      guidance_scale=guidance_scale,
      guidance_interval=guidance_interval,
      first_index=first_index,
    )
    count = codes.shape[0]
    padded = jnp.concatenate([codes, codes]) if count < MIN_BATCH else codes
    return self.tokenizer.decode(padded)[:count]

  def sample_codes(
    self,
    labels: Sequence[int] | Int[np.ndarray, ' b'] | Int[Array, ' b'],
    *,
    seed: int,
    sampler: str,
    num_steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
    first_index: int = 0,
  ) -> Float[Array, 'b k e']:
    """As `sample`, but the codes that the tokenizer decodes."""
    labels = self._check(labels)
    if not 0 <= seed < 2**32:
      raise errors.UserError(f'seed={seed}; wanted 0 to {2**32 - 1}')
    count = len(labels)
    if count < MIN_BATCH:
      labels = np.resize(labels, MIN_BATCH)
    codes = self._sample(
      self.params,
      self.latents,
      jnp.asarray(labels, jnp.int32),
      jnp.arange(first_index, first_index + len(labels)),
      jnp.asarray(seed, jnp.uint32),
      sampler=sampler,
      num_steps=num_steps,
      scale=float(guidance_scale),
      interval=tuple(guidance_interval),
    )
    return codes[:count]

  def _check(self, labels) -> Int[np.ndarray, ' b']:
    given = np.asarray(labels)
    if given.ndim != 1 or not given.size or given.dtype.kind not in 'iu':
      raise errors.UserError(
        f'labels of shape {given.shape} and type {given.dtype}; wanted a list '
        'of one or more integers'
      )
    bad = given[(given < 0) | (given >= self.num_classes)]
    if bad.size:
      raise errors.UserError(
        f'label {int(bad[0])}; wanted 0 to {self.num_classes - 1}, the classes '
        'that this generator was trained on'
      )
    return given.astype(np.int32)

  def _sample_codes(
    self,
    params,
    latents,
    labels,
    indices,
    seed,
    *,
    sampler,
    num_steps,
    scale,
    interval,
  ):
    shape = (self.model.num_tokens, self.model.token_dim)
    start, noise = noise_lib.make_noise(seed, indices, shape)

    def velocity(x, t, labels):
      return self.model.apply({'params': params}, x, t, labels)

    options = {'noise': noise} if sampler == 'sde' else {}
    x = guidance.sample(
      velocity,
      start,
      labels,
      null_label=self.num_classes,
      scale=scale,
      interval=interval,
      sampler=sampler,
      num_steps=num_steps,
      path=self._path,
      **options,
    )
    return generator_task.denormalise(x, latents)


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


def load_generator(
  workdir: str | os.PathLike[str], *, tokenizer: ImageTokenizer
) -> ImageGenerator:
  """Loads a generator from the workdir of its training, with EMA weights.

  Raises:
    CheckpointError: the generator was trained on codes of another tokenizer.
  """
  run = checkpointing.read_run(
    str(workdir), what='generator workdir', task='generator'
  )
  if run.meta['tokenizer_fingerprint'] != tokenizer.fingerprint:
    raise errors.CheckpointError(
      f'{workdir} was trained on the codes of another tokenizer '
      f'({run.meta["tokenizer_fingerprint"][:12]} there, '
      f'{tokenizer.fingerprint[:12]} given); use that tokenizer, or one scaled '
      'from it'
    )
  names = run.meta['class_names']
  model = sit.SiT(
    num_tokens=tokenizer.num_tokens,
    token_dim=tokenizer.token_dim,
    num_classes=len(names),
    **run.config['model'],
  )
  return ImageGenerator(
    model,
    run.ema['generator'],
    run.stats['latents'],
    tokenizer,
    path=run.config['loss']['path'],
    class_names=names,
    step=run.step,
    config=run.config,
  )


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
