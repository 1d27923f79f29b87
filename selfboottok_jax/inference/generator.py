"""A trained generator as an object: sample."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from selfboottok_jax import errors
from selfboottok_jax.flow import guidance
from selfboottok_jax.flow import noise as noise_lib
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference import tokenizer as tokenizer_lib
from selfboottok_jax.models import sit
from selfboottok_jax.tasks import generator as generator_task
from selfboottok_jax.training import checkpointing

# At one sample a device XLA picks other kernels; from two on, the same sample
# in another batch differs by rounding at most.
MIN_BATCH = 2


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
    tokenizer: tokenizer_lib.ImageTokenizer,
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


def load_generator(
  workdir: str | os.PathLike[str], *, tokenizer: tokenizer_lib.ImageTokenizer
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
