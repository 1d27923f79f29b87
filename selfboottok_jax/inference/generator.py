"""A trained generator as an object that samples."""

import copy
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Integer, PyTree, UInt8

from selfboottok_jax import errors, pixels
from selfboottok_jax.flow import guidance, samplers
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference import device_batch as device_batch_lib
from selfboottok_jax.inference import sampling as sampling_lib
from selfboottok_jax.inference.tokenizer import Tokenizer, load_tokenizer
from selfboottok_jax.models import layers, sit, transformer
from selfboottok_jax.training import checkpointing

# Keys of a state: the generator's parameters, and mean and deviation of the
# codes. Checkpoints have them.
GROUP, CODE_STATISTICS = 'generator', 'latents'
_AXIS = 'data'
# The largest index of a sample: indices are int32 on the devices.
_MOST = 2**31 - 1

Labels = Sequence[int] | Int[np.ndarray, ' b'] | Int[Array, ' b']


class ImageGenerator:
  """A trained generator and the tokenizer that decodes for it.

  A batch is shared by all devices of this process, each with the whole model.
  A device always computes `device_batch` samples at a time, with padding where
  there are fewer, since kernels of another size sum in another order. So a
  sample has the same bits in every batch and on any number of equal devices.

  Attributes:
    device_batch: samples that a device computes at a time.
    mesh: the devices.
    params: parameters of the network, on every device.
    statistics: 'mean' and 'std' of the codes.
    tokenizer: decodes; its local aligner may be any scaled one.
    num_classes: labels are 0 to num_classes - 1.
    class_names: class names of the training data.
    sampling: settings that `sample` takes by default.
    step: updates made in training.
    config: configuration of the training.
  """

  def __init__(
    self,
    model: sit.SiT,
    params: PyTree,
    statistics: Mapping[str, Any],
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
    """Places a network's parameters on the devices.

    Args:
      model: the network.
      params: its parameters.
      statistics: 'mean' and 'std' of the codes [e], which undo the
        normalisation.
      tokenizer: decodes the codes.
      path: path that the network was trained on.
      sampling: settings that `sample` takes by default.
      class_names: names of the labels.
      step: updates made in training.
      config: configuration of the training.
      devices: devices that share a batch; all of this process by default.
      device_batch: samples that a device computes at a time; 0 is 4 on CPUs
        and 32 elsewhere.
    """
    self.model = model
    devices = devices or jax.local_devices()
    self.device_batch = device_batch or device_batch_lib.default(devices)
    self.mesh = Mesh(np.array(devices), (_AXIS,), axis_types=(AxisType.Auto,))
    self._everywhere = NamedSharding(self.mesh, P())
    self.statistics = jax.device_put(dict(statistics), self._everywhere)
    self.params = jax.device_put(params, self._everywhere)
    self.sampling = sampling or sampling_lib.Sampling()
    self.num_classes = model.num_classes
    self.class_names = tuple(class_names)
    self.step, self.config = step, config or {}
    self._path = path_lib.PATHS[path]
    self.tokenizer = tokenizer
    # Placed once, not with every batch.
    self._decoding = jax.device_put(tokenizer.params, self._everywhere)
    self._compiled: dict[Any, Any] = {}

  @property
  def round_size(self) -> int:
    """Returns the number of samples that all devices compute at a time."""
    return self.mesh.size * self.device_batch

  def with_params(
    self, params: PyTree, statistics: Mapping[str, Any]
  ) -> 'ImageGenerator':
    """Returns a copy with other parameters, which shares compiled programs.

    Args:
      params: parameters of the network.
      statistics: 'mean' and 'std' of the codes [e].
    """
    # A shallow copy: programs take parameters as arguments, so both objects may
    # use one cache of them.
    other = copy.copy(self)
    other.params = jax.device_put(params, self._everywhere)
    other.statistics = jax.device_put(dict(statistics), self._everywhere)
    return other

  def with_device_batch(self, device_batch: int) -> 'ImageGenerator':
    """Returns a copy that computes so many samples at a time on a device."""
    other = copy.copy(self)
    other.device_batch = device_batch
    return other

  def fit_device_batch(
    self,
    sampling: sampling_lib.Sampling,
    *,
    most: int = device_batch_lib.MOST,
    limit: int | None = None,
  ) -> int:
    """Chooses how many samples the memory of a device allows at a time.

    The programs that sample and decode are compiled, and used later.

    Args:
      sampling: settings; guided steps take the most memory.
      most: at most so many.
      limit: bytes that there are; None asks the devices.

    Returns:
      A power of two; `self.device_batch` on devices, such as CPUs, that do not
      say how much memory they have.
    """
    limit = limit or device_batch_lib.memory_limit(list(self.mesh.devices.flat))
    if limit is None:
      return self.device_batch
    return device_batch_lib.largest_that_fits(
      functools.partial(self._bytes_needed, sampling), limit, most
    )

  def _bytes_needed(
    self, sampling: sampling_lib.Sampling, device_batch: int
  ) -> int | None:
    """Bytes on each device to sample and decode; None if beyond the compiler.

    Two batches are there at a time, as one is fetched while the next is
    computed, and turning images into bytes takes as much again.
    """
    count = self.mesh.size * device_batch
    rows = NamedSharding(self.mesh, P(_AXIS))
    integers = jax.ShapeDtypeStruct((count,), jnp.int32, sharding=rows)
    shape = (count, self.model.num_tokens, self.model.token_dim)
    codes = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    try:
      with jax.set_mesh(self.mesh):
        programs = [
          self._program(sampling).lower(
            self.params,
            self.statistics,
            integers,
            integers,
            *_traced_settings(0, sampling),
          ),
          self._decoder().lower(self._decoding, codes),
        ]
        found = [p.compile().memory_analysis() for p in programs]
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      return None
    parameters = sum(
      leaf.nbytes for leaf in jax.tree.leaves((self.params, self._decoding))
    )
    inside = max(m.temp_size_in_bytes for m in found)
    results = sum(m.output_size_in_bytes for m in found)
    # All parameters lie on each device.
    return parameters + inside + 4 * results

  def sample(
    self,
    labels: Labels,
    *,
    seed: int = 0,
    indices: Sequence[int] | Int[np.ndarray, ' b'] | None = None,
    **settings: Unpack[sampling_lib.Changes],
  ) -> Float[Array, 'b h w 3']:
    """Generates images of the given classes.

    Args:
      labels: classes, one per image.
      seed: seed of the noise.
      indices: numbers of the samples, 0 to 2^31 - 1; by default their places
        in `labels`. A sample depends on the seed, its label and its index
        alone, whatever the batch and however many the devices.
      **settings: fields of `Sampling` to change from `self.sampling`.

    Returns:
      float32 images [b, h, w, 3] in [-1, 1].

    Raises:
      UserError: labels, indices, seed or settings out of range.
    """
    parts = [
      self.decode(codes) for codes in self._run(labels, seed, indices, settings)
    ]
    return jnp.concatenate(parts)[: len(labels)]

  def sample_uint8(
    self,
    labels: Labels,
    *,
    rounding: str = 'truncate',
    seed: int = 0,
    indices: Sequence[int] | Int[np.ndarray, ' b'] | None = None,
    **settings: Unpack[sampling_lib.Changes],
  ) -> UInt8[Array, 'b h w 3']:
    """Generates images as uint8, with the arguments of `sample`.

    `rounding` is a key of `pixels.ROUNDINGS`. The default rounds down, as REG's
    evaluation protocol does.
    """
    images = self.sample(labels, seed=seed, indices=indices, **settings)
    return pixels.to_uint8(images, rounding)

  def sample_codes(
    self,
    labels: Labels,
    *,
    seed: int = 0,
    indices: Sequence[int] | Int[np.ndarray, ' b'] | None = None,
    **settings: Unpack[sampling_lib.Changes],
  ) -> Float[Array, 'b k e']:
    """Generates codes without decoding them, with the arguments of `sample`.

    Returns:
      float32 codes [b, k, e], as the tokenizer's `decode` takes them.
    """
    parts = list(self._run(labels, seed, indices, settings))
    return jnp.concatenate(parts)[: len(labels)]

  def _run(
    self,
    labels: Labels,
    seed: int,
    indices: Sequence[int] | Int[np.ndarray, ' b'] | None,
    settings: sampling_lib.Changes,
  ) -> Iterator[Float[Array, 'b k e']]:
    """Yields codes round by round, each round filling all devices.

    The last round is padded. Rounds are dispatched, not waited for.
    """
    labels = as_labels(labels, self.num_classes)
    indices = as_indices(indices, len(labels))
    if not 0 <= seed < 2**32:
      raise errors.UserError(f'seed={seed}; wanted 0 to {2**32 - 1}')
    sampling = dataclasses.replace(self.sampling, **settings)
    program = self._program(sampling)
    rows = NamedSharding(self.mesh, P(_AXIS))
    at_a_time = self.round_size
    for first in range(0, len(labels), at_a_time):
      # `np.resize` pads by repeating the rows, so padding holds valid labels.
      placed = [
        jax.device_put(np.resize(a[first : first + at_a_time], at_a_time), rows)
        for a in (labels, indices)
      ]
      with jax.set_mesh(self.mesh):
        codes = program(
          self.params,
          self.statistics,
          *placed,
          *_traced_settings(seed, sampling),
        )
      yield codes

  def _program(self, sampling: sampling_lib.Sampling) -> Any:
    """Returns the compiled sampler that fits these settings.

    Scales and interval are its arguments, so a sweep of them compiles once.
    """
    # Settings that are arguments of the program get fixed stand-ins, so that
    # all their values share one cache entry.
    key = dataclasses.replace(
      sampling,
      guidance_scale=2.0 if sampling.guides else 1.0,
      cls_guidance_scale=-1.0,
      guidance_low=0.0,
      guidance_high=1.0,
    )
    if key not in self._compiled:
      run = functools.partial(
        make_codes,
        self.model,
        key,
        path=self._path,
        latent_dim=self.tokenizer.latent_dim,
      )
      shared, rows = P(), P(_AXIS)
      self._compiled[key] = jax.jit(
        # Each device samples alone. Left to itself, XLA would spread the
        # doubled batch [x, x] of a guided step over all devices.
        jax.shard_map(
          run,
          mesh=self.mesh,
          in_specs=(shared, shared, rows, rows, shared, shared, shared),
          out_specs=rows,
          # Kernels do not say along which axes their results differ.
          check_vma=False,
        )
      )
    return self._compiled[key]

  def decode(self, codes: Float[Array, 'b k e']) -> Float[Array, 'b h w 3']:
    """Decodes `round_size` codes on all devices into images in [-1, 1]."""
    with jax.set_mesh(self.mesh):
      return self._decoder()(self._decoding, codes)

  def _decoder(self) -> Any:
    """Returns the compiled decoder, of the tokenizer's parameters and codes."""
    decoder = self.tokenizer
    # The tokenizer itself is the key: assigning another one compiles for it.
    if decoder not in self._compiled:
      self._compiled[decoder] = jax.jit(
        jax.shard_map(
          lambda params, codes: jnp.clip(
            decoder.decode_with(params, codes), -1, 1
          ),
          mesh=self.mesh,
          in_specs=(P(), P(_AXIS)),
          out_specs=P(_AXIS),
          check_vma=False,  # As above.
        )
      )
    return self._compiled[decoder]


def _traced_settings(seed: int, sampling: sampling_lib.Sampling) -> tuple:
  """Seed, scales and interval, as a compiled sampler takes them.

  They are its arguments and not constants in it, so that a sweep compiles once.
  """
  scales = np.asarray(sampling.scales, np.float32)
  interval = tuple(np.float32(end) for end in sampling.interval)
  return np.uint32(seed), scales, interval


def make_codes(
  model: sit.SiT,
  sampling: sampling_lib.Sampling,
  params: PyTree,
  statistics: PyTree,
  labels: Int[Array, ' b'],
  indices: Int[Array, ' b'],
  seed: Integer[Array, ''],
  scales: Float[Array, ' 2'],
  interval: guidance.Interval,
  *,
  path: path_lib.Path,
  latent_dim: int,
) -> Float[Array, 'b k e']:
  """Samples codes from noise; can be jitted over all arrays.

  `model`, `sampling`, `path` and `latent_dim` are static. With traced scales
  and a traced interval one program serves a sweep of them.

  Args:
    model: the network.
    sampling: sampler and steps; of its guidance only its presence and its
      channels count, the rest comes as `scales` and `interval`.
    params: parameters of the network.
    statistics: 'mean' and 'std' of the codes, which undo the normalisation.
    labels: classes.
    indices: indices of the samples; each index has its own noise.
    seed: seed of the noise.
    scales: guidance scales of the tokens and of the class token.
    interval: (low, high), the times between which guidance acts.
    path: path that the network was trained on.
    latent_dim: channels of a latent, see `Sampling.guided_channels`.

  Returns:
    Codes in float32.
  """
  shapes: dict[str, tuple[int, ...]] = {
    'tokens': (model.num_tokens, model.token_dim)
  }
  scale: dict[str, Array] = {'tokens': scales[0]}
  if sampling.guided_channels:
    # A code is a patch of latents; their channel is its fastest axis.
    channel = np.arange(model.token_dim) % latent_dim
    is_guided = channel < sampling.guided_channels
    scale['tokens'] = jnp.where(is_guided, scales[0], 1.0)
  if model.cls_dim:
    shapes['cls'] = (model.cls_dim,)
    scale['cls'] = scales[1]
  start, noise = samplers.make_noise(seed, indices, shapes)

  module: Any = model
  # Once, before the loop over the steps: each block would do it at each step.
  params = {
    name: layers.cast_dense(part, model.dtype)
    if name.startswith(transformer.SEGMENT)
    else part
    for name, part in params.items()
  }

  def velocity(
    state: dict[str, Array], t: Array, labels: Array
  ) -> dict[str, Array]:
    out = module.apply(
      {'params': params}, state['tokens'], t, labels, state.get('cls')
    )
    moves = {'tokens': out.tokens, 'cls': out.cls}
    return {name: moves[name] for name in state}

  # Only the SDE draws noise after the start.
  options: dict[str, Any] = (
    {'noise': noise} if sampling.sampler == 'sde' else {}
  )
  state: Any = guidance.sample(
    velocity,
    start,
    labels,
    null_label=model.num_classes,
    scale=1.0 if sampling.is_unguided else scale,
    interval=interval,
    sampler=sampling.sampler,
    times=sampling.times,
    path=path,
    **options,
  )
  return path_lib.denormalise_codes(state['tokens'], statistics)


def load_generator(
  workdir: str | os.PathLike[str],
  *,
  tokenizer: Tokenizer | str | os.PathLike[str],
  device_batch: int = 0,
  step: int | None = None,
  ema: bool = True,
) -> ImageGenerator:
  """Loads a generator from the workdir of its training.

  Args:
    workdir: folder of the training.
    tokenizer: the one whose codes it was trained on, or one scaled from it; or
      what `load_tokenizer` knows it by, where an autoencoder then is one of
      images of the generator's size.
    device_batch: samples that a device computes at a time; 0 is 4 on CPUs and
      32 elsewhere.
    step: checkpoint to load, the newest by default.
    ema: False loads the parameters themselves, not their running means.

  Raises:
    CheckpointError: the generator was trained on codes of another tokenizer,
      or there is no such step.
  """
  run = checkpointing.read_run(
    str(workdir),
    what='generator workdir',
    task='generator',
    step=step,
    ema=ema,
  )
  if isinstance(tokenizer, str | os.PathLike):
    tokenizer = load_tokenizer(
      tokenizer, image_size=run.config['data']['image_size']
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
  """Builds a generator from a run that was read already."""
  # Sizes of the codes come from the tokenizer, whose fingerprint was checked;
  # the number of classes from the data that the run was trained on.
  names = run.meta['class_names']
  model = sit.SiT(
    num_tokens=tokenizer.num_tokens,
    token_dim=tokenizer.token_dim,
    num_classes=len(names),
    **run.config['model'],
  )
  return ImageGenerator(
    model,
    run.ema[GROUP],
    run.stats[CODE_STATISTICS],
    tokenizer,
    path=run.config['loss']['path'],
    sampling=sampling_lib.Sampling(**run.config['sampling']),
    class_names=names,
    step=run.step,
    config=run.config,
    device_batch=device_batch,
  )


def as_labels(labels: Any, num_classes: int) -> Int[np.ndarray, ' b']:
  """Checks labels and returns them as int32 [b].

  Raises:
    UserError: not a non-empty list of integers from 0 to num_classes - 1.
  """
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
  """Checks the indices of samples; None stands for 0, 1, 2, ...

  Returns:
    int32 indices [count].

  Raises:
    UserError: anything but `count` whole numbers from 0 to 2^31 - 1.
  """
  given = np.arange(count) if indices is None else np.asarray(indices)
  fits = given.shape == (count,) and given.dtype.kind in 'iu'
  if not fits or ((given < 0) | (given > _MOST)).any():
    raise errors.UserError(
      f'indices of shape {given.shape} and type {given.dtype}; wanted {count} '
      f'integers, one for each label, from 0 to {_MOST}'
    )
  return given.astype(np.int32)
