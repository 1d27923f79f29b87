"""The suite of checks and measurements of one machine.

Arithmetic comes first: a step that is fast and wrong is worth nothing. Then
train steps, sampling and encoding are timed at the sizes of the paper, or at
tiny ones where there is no accelerator. At last small trainings are compared
with those of the CPU.
"""

import copy
import dataclasses
import datetime
import functools
import gc
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from selfboottok_jax import errors, inference, presets, sizes
from selfboottok_jax.models import layers, transformer
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.stages import benchmark, dry_run, programs
from selfboottok_jax.training import sharding

GROUPS = ('correctness', 'steps', 'sampling', 'encoding', 'training')
SIZES = ('full', 'tiny')
# Largest relative errors. Products of bfloat16 keep 8 bits, of which sums of
# many terms lose a few; float32 keeps 24, and TF32 (11) must not pass for it.
BFLOAT16_BOUND = 2e-2
FLOAT32_BOUND = 2e-5
# Between devices, after a few steps that each add their rounding.
STEP_BOUND = 1e-3
_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Entry:
  """A check or a measurement.

  Attributes:
    group: one of GROUPS.
    name: unique within the suite.
    measure: returns the record; checks have 'error' and 'bound', or 'ok'.
  """

  group: str
  name: str
  measure: Callable[[], dict[str, Any]]


def run(
  size: str = '',
  *,
  only: Sequence[str] = (),
  seconds: float = 480.0,
  on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
  """Runs the suite.

  Args:
    size: one of SIZES; '' is 'tiny' on CPUs and 'full' elsewhere.
    only: groups, or names of single entries, to run; all by default.
    seconds: no entry begins later than this; those left are listed as skipped.
    on_record: called with each entry's record when it is there.

  Returns:
    'device', 'devices', 'jax', 'python', 'date', 'size' and 'seconds'; 'ok',
    True if all checks passed and nothing failed; and 'entries', records with
    'group' and 'name' and, for an entry that did not begin or did not end,
    'skipped' or 'failed' with the reason.

  Raises:
    ConfigError: an unknown size, group or name.
  """
  is_cpu = jax.default_backend() == 'cpu'
  size = size or ('tiny' if is_cpu else 'full')
  errors.require_choice('size', size, SIZES)
  chosen = list(entries(size))
  names = [entry.name for entry in chosen]
  for name in only:
    errors.require_choice('only', name, [*GROUPS, *names])
  if only:
    chosen = [e for e in chosen if e.group in only or e.name in only]
  began = time.monotonic()
  records = []
  for entry in chosen:
    record: dict[str, Any] = {'group': entry.group, 'name': entry.name}
    if time.monotonic() - began > seconds:
      record['skipped'] = f'the {seconds:g} seconds were over'
    else:
      record |= _measure(entry)
    records.append(record)
    on_record(record)
  device = jax.devices()[0]
  return {
    'device': device.device_kind,
    'devices': jax.device_count(),
    'jax': jax.__version__,
    'python': platform.python_version(),
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d'),
    'size': size,
    'seconds': time.monotonic() - began,
    'ok': all(r.get('ok', True) and 'failed' not in r for r in records),
    'entries': records,
  }


def entries(size: str) -> Iterator[Entry]:
  """Lists what the suite does, in its order."""
  for name, check in _CHECKS.items():
    yield Entry('correctness', name, check)
  for row in _STEP_ROWS[size]:
    name, preset, changes = row
    measure = functools.partial(_time_step, preset, changes)
    yield Entry('steps', name, measure)
  preset, changes, batches, num_steps = _SAMPLING[size]
  for batch in batches:
    yield Entry(
      'sampling',
      f'{preset}_batch{batch}',
      functools.partial(_time_sampling, preset, changes, batch, num_steps),
    )
  preset, changes, batches = _ENCODING[size]
  for batch in batches:
    yield Entry(
      'encoding',
      f'{preset}_batch{batch}',
      functools.partial(_time_encoding, preset, changes, batch),
    )
  # Last, because the CPU takes long to compile its side of the comparison.
  yield Entry('training', 'repeats_bit_for_bit', _check_repeats)
  for stage in ('generator', 'tokenizer', 'scaling'):
    yield Entry(
      'training', f'{stage}_equals_cpu', functools.partial(_check_step, stage)
    )


def _measure(entry: Entry) -> dict[str, Any]:
  """Runs one entry; a failure becomes its record."""
  began = time.monotonic()
  try:
    record = entry.measure()
  except Exception as error:  # noqa: BLE001
    # Out of memory, or a kernel that a device lacks: the rest is still wanted.
    first = str(error).strip().splitlines() or ['']
    record = {'failed': f'{type(error).__name__}: {first[0][:300]}'}
  if 'error' in record:
    record['ok'] = bool(record['error'] <= record['bound'])
  # The next entry wants all of the memory.
  gc.collect()
  jax.clear_caches()
  return {**record, 'seconds': time.monotonic() - began}


def _check_attention(
  queries: int, keys: int, *, masked: bool, dtype: str
) -> dict[str, Any]:
  """Attention and its gradients beside float64."""
  rng = np.random.default_rng(0)
  # Two images for each device: kernels of TPUs want to know where they are.
  images = 2 * jax.device_count()
  shapes = [(images, n, 4, 72) for n in (queries, keys, keys)]
  # Rounded first, so that both sides see the same numbers.
  wide = [
    np.asarray(jnp.asarray(rng.normal(size=s), dtype), np.float64)
    for s in shapes
  ]
  cotangent = np.asarray(
    jnp.asarray(rng.normal(size=shapes[0]), dtype), np.float64
  )
  mask = None
  if masked:
    mask = np.array(transformer.prefix_causal_mask(keys // 2, keys // 2))

  def attend(q: Any, k: Any, v: Any) -> Any:
    seen = None if mask is None else jnp.asarray(mask)
    return layers.attend(q, k, v, seen)

  @jax.jit
  def both(qkv: Any, cotangent: Any) -> Any:
    value, pull = jax.vjp(attend, *qkv)
    return value, *pull(cotangent)

  narrow = [jnp.asarray(a, dtype) for a in wide]
  with jax.set_mesh(sharding.make_mesh()):
    found = both(narrow, jnp.asarray(cotangent, dtype))
  q, k, v = wide
  wanted = _attention_in_float64(q, k, v, cotangent, mask)
  error = max(map(_relative, found, wanted))
  bound = BFLOAT16_BOUND if dtype == 'bfloat16' else FLOAT32_BOUND
  return {'error': error, 'bound': bound}


def _attention_in_float64(
  q: np.ndarray,
  k: np.ndarray,
  v: np.ndarray,
  cotangent: np.ndarray,
  mask: np.ndarray | None,
) -> list[np.ndarray]:
  """The value, and the gradients in q, k and v, by the textbook."""
  scale = q.shape[-1] ** -0.5
  logits = np.einsum('bqhd,bkhd->bhqk', q, k) * scale
  if mask is not None:
    logits = np.where(mask[None, None], logits, -np.inf)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  weights /= weights.sum(axis=-1, keepdims=True)
  value = np.einsum('bhqk,bkhd->bqhd', weights, v)
  in_weights = np.einsum('bqhd,bkhd->bhqk', cotangent, v)
  mean = (in_weights * weights).sum(axis=-1, keepdims=True)
  in_logits = weights * (in_weights - mean) * scale
  return [
    value,
    np.einsum('bhqk,bkhd->bqhd', in_logits, k),
    np.einsum('bhqk,bqhd->bkhd', in_logits, q),
    np.einsum('bhqk,bqhd->bkhd', weights, cotangent),
  ]


def _check_float32_products() -> dict[str, Any]:
  """A float32 layer beside float64: rounded operands would show."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 1024)).astype(np.float32)
  layer = layers.dense(512, 'float32')
  variables = jax.jit(layer.init)(jax.random.key(0), x)
  found = jax.jit(layer.apply)(variables, x)
  kernel = np.asarray(variables['params']['kernel'], np.float64)
  wanted = x.astype(np.float64) @ kernel
  return {'error': _relative(found, wanted), 'bound': FLOAT32_BOUND}


def _relative(found: Any, wanted: np.ndarray) -> float:
  """The largest error, over the largest value."""
  found = np.asarray(found, np.float64)
  return float(np.abs(found - wanted).max() / np.abs(wanted).max())


_CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
  'attention_bfloat16': functools.partial(
    _check_attention, 64, 64, masked=False, dtype='bfloat16'
  ),
  'attention_bfloat16_odd': functools.partial(
    _check_attention, 65, 65, masked=False, dtype='bfloat16'
  ),
  'attention_bfloat16_cross': functools.partial(
    _check_attention, 257, 64, masked=False, dtype='bfloat16'
  ),
  'attention_bfloat16_masked': functools.partial(
    _check_attention, 128, 128, masked=True, dtype='bfloat16'
  ),
  # Long enough for the kernel of TPUs, and not of whole tiles.
  'attention_bfloat16_long': functools.partial(
    _check_attention, 321, 321, masked=False, dtype='bfloat16'
  ),
  'attention_float32': functools.partial(
    _check_attention, 65, 65, masked=False, dtype='float32'
  ),
  'float32_products': _check_float32_products,
}


def _small(stage: str) -> ml_collections.ConfigDict:
  """The quickstart's training, in its last phase from the first step on."""
  config = _changed(f'{stage}:quickstart', _ROLLED)
  config.data.batch_size = 8 * jax.device_count()
  if stage != 'generator':
    config.loss.adversarial = 0.005
    config.loss.adversarial_start = 0.0
  return config


def _check_step(stage: str) -> dict[str, Any]:
  """Losses of a few float32 steps beside those of one CPU device."""
  config = _small(stage)
  cpu = sharding.make_mesh(devices=jax.devices('cpu')[:1])
  there = _Steps(config, cpu)
  start = there.draw()
  wanted = there.run(start)
  found = _Steps(config, sharding.make_mesh()).run(start)
  error = max(
    abs(found[name] - wanted[name]) / (abs(wanted[name]) + 1e-3)
    for name in wanted
    if name.endswith('loss')
  )
  return {'error': error, 'bound': STEP_BOUND}


def _check_repeats() -> dict[str, Any]:
  """Whether steps in 16 bits give the same bits twice, as resuming promises."""
  config = _small('tokenizer')
  config.model.dtype = 'bfloat16'
  steps = _Steps(config, sharding.make_mesh())
  start = steps.draw()
  return {'ok': steps.run(start) == steps.run(start)}


class _Steps:
  """A few train steps on made-up images, from a state in host memory."""

  def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
    """Traces the steps for the devices of a mesh."""
    task = dry_run.abstract_task(config).task
    self._mesh = mesh
    self._step_fn = programs.TrainPrograms(config, task, mesh)
    self._frozen = dry_run.materialise(task.frozen, mesh)

  def draw(self) -> PyTree:
    """Initialises a state, and brings it to the host."""
    return jax.device_get(self._step_fn.init())

  def run(self, start: PyTree) -> dict[str, float]:
    """Returns the metrics of the last step."""
    rng = np.random.default_rng(0)
    batch = {
      name: benchmark.made_up(rng, leaf.shape, leaf.dtype)
      for name, leaf in self._step_fn.batch.items()
    }
    state = jax.tree.map(
      lambda leaf, like: jax.device_put(leaf, like.sharding),
      start,
      self._step_fn.state,
    )
    placed = sharding.put_batch(batch, self._mesh)
    metrics: dict[str, Any] = {}
    with jax.set_mesh(self._mesh):
      for step in range(_STEPS):
        state, metrics = self._step_fn(state, self._frozen, placed, step)
    return {name: float(value) for name, value in metrics.items()}


def _changed(preset: str, changes: dict[str, Any]) -> ml_collections.ConfigDict:
  """The configuration of a preset, with changes by key."""
  config = copy.deepcopy(presets.get_config(preset))
  config.update_from_flattened_dict(changes)
  return config


def _time_step(preset: str, changes: dict[str, Any]) -> dict[str, Any]:
  """Times a train step; MFU of all networks, and of the trained ones."""
  config = _changed(preset, changes)
  record, _ = benchmark.measure(config, steps=5, rounds=4, with_loop=False)
  kept = (
    *('batch_size', 'dtype', 'attention', 'remat', 'unroll'),
    *('trained_parameters', 'frozen_parameters', 'gflops_per_image'),
    *('compile_seconds', 'step_seconds', 'images_per_second'),
    *('tflops_per_second', 'mfu', 'mfu_trained', 'step_memory_bytes'),
  )
  return {'config': preset, **{name: record[name] for name in kept}}


# (name, preset, changes). Batches are those of one device.
_Row = tuple[str, str, dict[str, Any]]
_XL = {'assumed.cache': True, 'data.batch_size': 256, 'model.remat': 'dots'}
_TOKENIZER = {'data.batch_size': 64, 'model.remat': 'dots'}
# Unrolled blocks would take minutes to compile.
_ROLLED = {'model.unroll': 1}
_STEP_ROWS: dict[str, list[_Row]] = {
  'full': [
    ('xl_cached', 'generator:imagenet256_xl', _XL),
    ('tokenizer', 'tokenizer:imagenet256', _TOKENIZER),
    (
      'xl_cached_xla_attention',
      'generator:imagenet256_xl',
      {**_XL, 'model.attention': 'xla'},
    ),
    (
      'tokenizer_xla_attention',
      'tokenizer:imagenet256',
      {**_TOKENIZER, 'model.attention': 'xla'},
    ),
    ('scaling_600m', 'scaling:imagenet256_600m', _TOKENIZER),
    (
      'xl_cached_keep_all',
      'generator:imagenet256_xl',
      {**_XL, 'model.remat': 'none'},
    ),
    (
      'xl_cached_remat_blocks',
      'generator:imagenet256_xl',
      {**_XL, 'model.remat': 'block'},
    ),
    (
      'tokenizer_remat_blocks',
      'tokenizer:imagenet256',
      {**_TOKENIZER, 'model.remat': 'block'},
    ),
    ('xl_images', 'generator:imagenet256_xl', {**_XL, 'assumed.cache': False}),
    (
      'xl_cached_unrolled',
      'generator:imagenet256_xl',
      {**_XL, 'model.unroll': 4},
    ),
  ],
  'tiny': [
    ('generator', 'generator:quickstart', {**_ROLLED, 'data.batch_size': 8}),
    ('tokenizer', 'tokenizer:quickstart', {**_ROLLED, 'data.batch_size': 8}),
  ],
}
# Preset, changes, samples that a device computes at a time, steps of a sample.
_SAMPLING: dict[str, tuple[str, dict[str, Any], tuple[int, ...], int]] = {
  'full': ('generator:imagenet256_xl', {}, (256, 64, 32), 250),
  'tiny': ('generator:quickstart', _ROLLED, (4,), 5),
}
_ENCODING: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
  'full': ('tokenizer:imagenet256', {}, (256, 32)),
  'tiny': ('tokenizer:quickstart', _ROLLED, (4,)),
}


def _time_sampling(
  preset: str, changes: dict[str, Any], device_batch: int, num_steps: int
) -> dict[str, Any]:
  """Times sampling with guidance, and decoding, with random weights."""
  config = _changed(preset, changes)
  generator = _generator(config, device_batch)
  labels = np.arange(generator.round_size) % generator.num_classes
  settings: Any = {'num_steps': num_steps}

  def sample() -> Any:
    return generator.sample_uint8(labels, **settings)

  began = time.monotonic()
  jax.block_until_ready(sample())
  first = time.monotonic() - began
  seconds = _best_of(2, sample)
  codes = generator.sample_codes(labels, **settings)
  code_seconds = _best_of(2, lambda: generator.sample_codes(labels, **settings))
  del codes
  rate = len(labels) / seconds
  return {
    'config': preset,
    'device_batch': device_batch,
    'protocol': dataclasses.replace(generator.sampling, **settings).describe(),
    'first_seconds': first,
    'images_per_second': rate,
    'codes_per_second': len(labels) / code_seconds,
    'minutes_for_50000': 50_000 / rate / 60,
  }


def _generator(
  config: ml_collections.ConfigDict, device_batch: int
) -> inference.ImageGenerator:
  """A generator with random weights, and its tokenizer."""
  task: Any = dry_run.abstract_task(config).task
  stage1 = _changed(
    f'tokenizer:{config.assumed.tokenizer}',
    {'model.unroll': config.model.unroll},
  )
  mesh = sharding.make_mesh()
  frozen = dry_run.materialise(
    jax.eval_shape(lambda: task.init(jax.random.key(0))[0]), mesh
  )
  return inference.ImageGenerator(
    task.model,
    frozen['generator'],
    {
      'mean': np.zeros(task.model.token_dim, np.float32),
      'std': np.ones(task.model.token_dim, np.float32),
    },
    _tokenizer(stage1),
    sampling=inference.Sampling(**config.sampling),
    device_batch=device_batch,
  )


def _tokenizer(config: ml_collections.ConfigDict) -> inference.ImageTokenizer:
  """A tokenizer with random weights."""
  model = tokenizer_lib.Tokenizer(
    image_size=sizes.canonical(config.data.image_size), **config.model
  )
  image = jnp.zeros((1, *sizes.pair(model.image_size), 3))
  variables: PyTree = jax.jit(model.init)(jax.random.key(0), image)
  return inference.ImageTokenizer(model, variables['params'])


def _time_encoding(
  preset: str, changes: dict[str, Any], batch: int
) -> dict[str, Any]:
  """Times encoding and decoding, with random weights."""
  tokenizer = _tokenizer(_changed(preset, changes))
  rng = np.random.default_rng(0)
  shape = (batch, *sizes.pair(tokenizer.image_size), 3)
  images = jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)
  codes = jax.block_until_ready(tokenizer.encode(images))
  jax.block_until_ready(tokenizer.decode(codes))
  encode = _best_of(5, lambda: tokenizer.encode(images))
  decode = _best_of(5, lambda: tokenizer.decode(codes))
  return {
    'config': preset,
    'batch_size': batch,
    'encoded_images_per_second': batch / encode,
    'decoded_images_per_second': batch / decode,
  }


def _best_of(count: int, call: Callable[[], Any]) -> float:
  """Seconds of the fastest of some calls."""
  seconds = []
  for _ in range(count):
    began = time.monotonic()
    jax.block_until_ready(call())
    seconds.append(time.monotonic() - began)
  return min(seconds)
