"""A trained generator as an object: sample."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree, UInt8

from selfboottok_jax import errors, pixels
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference import denoising
from selfboottok_jax.inference import sampling as sampling_lib
from selfboottok_jax.inference import tokenizer as tokenizer_lib
from selfboottok_jax.models import sit
from selfboottok_jax.pretrained import autoencoders
from selfboottok_jax.training import checkpointing

_AXIS = 'data'
# The largest number of a sample.
_MOST = 2**31 - 1
# Samples that a device computes at a time where nothing else is said.
_DEVICE_BATCH = {'cpu': 4}
_DEVICE_BATCH_ELSEWHERE = 32

Labels = Sequence[int] | Int[np.ndarray, ' b'] | Int[Array, ' b']
Tokenizer = tokenizer_lib.ImageTokenizer | autoencoders.ImageAutoencoder


class ImageGenerator:
  """A trained generator and the tokenizer that decodes for it.

  A batch is shared by all devices of this process, each with the whole model.
  A device always computes `device_batch` samples at a time, padded where there
  are fewer: kernels of another size sum in another order. So a sample has the
  same bits in every batch and on any number of devices of a kind.

  Attributes:
    device_batch: samples that a device computes at a time.
    mesh: of the devices.
    tokenizer: decodes; its local aligner may be any scaled one.
    num_classes: labels are 0 to num_classes - 1.
    class_names: of the training data.
    sampling: the settings that it was configured with.
    step: updates made in training.
    config: of the training.
  """

  def __init__(
    self,
    model: sit.SiT,
    params: PyTree,
    latents: PyTree,
    tokenizer: Tokenizer,
    *,
    path: str = 'linear',
    sampling: sampling_lib.Sampling | None = None,
    class_names: Sequence[str] = (),
    step: int = 0,
    config: dict[str, Any] | None = None,
    devices: Sequence[jax.Device] | None = None,
    device_batch: int = 0,
  ):
    """Wraps modules and parameters; `latents` undoes the normalisation."""
    self.model = model
    devices = devices or jax.local_devices()
    self.device_batch = device_batch or _DEVICE_BATCH.get(
      devices[0].platform, _DEVICE_BATCH_ELSEWHERE
    )
    self.mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
    self._everywhere = NamedSharding(self.mesh, P())
    self.latents = jax.device_put(dict(latents), self._everywhere)
    self.params = params
    self.sampling = sampling or sampling_lib.Sampling()
    self.num_classes = model.num_classes
    self.class_names = tuple(class_names)
    self.step, self.config = step, config or {}
    self._path = path_lib.PATHS[path]
    self.tokenizer = tokenizer
    self._compiled: dict[Any, Any] = {}

  @property
  def round_size(self) -> int:
    """Samples that all devices compute at a time."""
    return self.mesh.size * self.device_batch

  @property
  def params(self) -> PyTree:
    """Of the network."""
    return self._params

  @params.setter
  def params(self, params: PyTree) -> None:
    self._params = jax.device_put(params, self._everywhere)

  @property
  def tokenizer(self) -> Tokenizer:
    """What decodes."""
    return self._tokenizer

  @tokenizer.setter
  def tokenizer(self, tokenizer: Tokenizer) -> None:
    self._tokenizer = tokenizer
    # Once, not with every batch.
    self._decoding = jax.device_put(tokenizer.params, self._everywhere)

  def sample(
    self,
    labels: Labels,
    *,
    seed: int = 0,
    indices: Sequence[int] | Int[np.ndarray, ' b'] | None = None,
    **settings: Any,
  ) -> Float[Array, 'b h w 3']:
    """Images in [-1, 1] of the given classes.

    Args:
      labels: classes, one per image.
      seed: of the noise.
      indices: numbers of the samples, 0 to 2^31 - 1; their places in `labels`
        where they are not given. A sample depends on the seed, its label and
        its index alone, whatever the batch and however many the devices.
      **settings: changes of `self.sampling`.

    Returns:
      float32 images [b, h, w, 3].
    """
    parts = [
      self._decode(codes)
      for codes in self._run(labels, seed, indices, settings)
    ]
    return jnp.concatenate(parts)[: len(labels)]

  def sample_uint8(
    self, labels: Labels, *, rounding: str = 'truncate', **settings: Any
  ) -> UInt8[Array, 'b h w 3']:
    """As `sample`, but as bytes; `rounding` is a key of `pixels.ROUNDINGS`.

    REG's protocol rounds down.
    """
    return pixels.to_uint8(self.sample(labels, **settings), rounding)

  def sample_codes(
    self,
    labels: Labels,
    *,
    seed: int = 0,
    indices: Sequence[int] | Int[np.ndarray, ' b'] | None = None,
    **settings: Any,
  ) -> Float[Array, 'b k e']:
    """As `sample`, but the codes that the tokenizer decodes."""
    parts = list(self._run(labels, seed, indices, settings))
    return jnp.concatenate(parts)[: len(labels)]

  def _run(
    self, labels, seed, indices, settings
  ) -> Iterator[Float[Array, 'b k e']]:
    """Codes of one round of all devices after the other, the last one padded.

    Rounds are dispatched, not waited for.
    """
    labels = as_labels(labels, self.num_classes)
    indices = as_indices(indices, len(labels))
    if not 0 <= seed < 2**32:
      raise errors.UserError(f'seed={seed}; wanted 0 to {2**32 - 1}')
    sampling = dataclasses.replace(self.sampling, **settings)
    program = self._program(sampling)
    scales = np.asarray(sampling.scales, np.float32)
    interval = tuple(np.float32(end) for end in sampling.interval)
    rows = NamedSharding(self.mesh, P(_AXIS))
    at_a_time = self.round_size
    for first in range(0, len(labels), at_a_time):
      placed = [
        jax.device_put(np.resize(a[first : first + at_a_time], at_a_time), rows)
        for a in (labels, indices)
      ]
      with jax.set_mesh(self.mesh):
        codes = program(
          self.params,
          self.latents,
          *placed,
          np.uint32(seed),
          scales,
          interval,
        )
      yield codes

  def _program(self, sampling: sampling_lib.Sampling):
    """The compiled sampler, one with guidance and one without.

    Scales and interval are its arguments.
    """
    key = dataclasses.replace(
      sampling,
      guidance_scale=2.0 if sampling.guides else 1.0,
      cls_guidance_scale=-1.0,
      guidance_low=0.0,
      guidance_high=1.0,
    )
    if key not in self._compiled:
      run = functools.partial(
        denoising.make_codes,
        self.model,
        key,
        path=self._path,
        latent_dim=self.tokenizer.latent_dim,
      )
      shared, rows = P(), P(_AXIS)
      self._compiled[key] = jax.jit(
        # Devices have nothing to tell each other: without it, [x, x] of a
        # guided step would be spread over all of them.
        jax.shard_map(
          run,
          mesh=self.mesh,
          in_specs=(shared, shared, rows, rows, shared, shared, shared),
          out_specs=rows,
        )
      )
    return self._compiled[key]

  def _decode(self, codes):
    """Images of codes that lie on the devices."""
    decoder = self.tokenizer
    if decoder not in self._compiled:
      self._compiled[decoder] = jax.jit(
        jax.shard_map(
          lambda params, codes: jnp.clip(
            decoder.decode_with(params, codes), -1, 1
          ),
          mesh=self.mesh,
          in_specs=(P(), P(_AXIS)),
          out_specs=P(_AXIS),
        )
      )
    with jax.set_mesh(self.mesh):
      return self._compiled[decoder](self._decoding, codes)


def load_generator(
  workdir: str | os.PathLike[str],
  *,
  tokenizer: Tokenizer,
  device_batch: int = 0,
) -> ImageGenerator:
  """Loads a generator from the workdir of its training, with EMA weights.

  Args:
    workdir: of the training.
    tokenizer: whose codes it was trained on, or one scaled from that.
    device_batch: samples that a device computes at a time; 0 is 4 on CPUs and
      32 elsewhere.

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
  return generator_of(run, tokenizer, device_batch)


def generator_of(
  run: checkpointing.Run, tokenizer: Tokenizer, device_batch: int = 0
) -> ImageGenerator:
  """The generator of a run that was read already."""
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
    sampling=sampling_lib.Sampling(**run.config['sampling']),
    class_names=names,
    step=run.step,
    config=run.config,
    device_batch=device_batch,
  )


def as_labels(labels: Any, num_classes: int) -> Int[np.ndarray, ' b']:
  """Classes in int32; UserError for what is no list of classes."""
  given = np.asarray(labels)
  if given.ndim != 1 or not given.size or given.dtype.kind not in 'iu':
    raise errors.UserError(
      f'labels of shape {given.shape} and type {given.dtype}; wanted a list '
      'of one or more integers'
    )
  bad = given[(given < 0) | (given >= num_classes)]
  if bad.size:
    raise errors.UserError(
      f'label {int(bad[0])}; wanted 0 to {num_classes - 1}, the classes that '
      'this generator was trained on'
    )
  return given.astype(np.int32)


def as_indices(indices: Any, count: int) -> Int[np.ndarray, ' b']:
  """Numbers of samples in int32, 0, 1, ... where they are None.

  Raises:
    UserError: other than `count` whole numbers from 0 to 2^31 - 1.
  """
  given = np.arange(count) if indices is None else np.asarray(indices)
  fits = given.shape == (count,) and given.dtype.kind in 'iu'
  if not fits or given.min() < 0 or given.max() > _MOST:
    raise errors.UserError(
      f'indices of shape {given.shape} and type {given.dtype}; wanted {count} '
      f'integers, one for each label, from 0 to {_MOST}'
    )
  return given.astype(np.int32)
