"""Scores of finished runs, each with its protocol."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PyTree, UInt8

from selfboottok_jax import (
  __version__,
  errors,
  files,
  inference,
  pixels,
  trees,
)
from selfboottok_jax.evaluation import (
  scores,
  tables,
)
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import samplers
from selfboottok_jax.pretrained import contract

Images = UInt8[Array, 'b h w 3'] | UInt8[np.ndarray, 'b h w 3']
Batches = Iterable[dict[str, np.ndarray]]
# The file of a workdir that holds the scores of its run.
SCORES = 'scores.json'
# The file of a workdir that lists files of scores elsewhere, as `--out` wrote.
SCORE_FILES = 'score_files.json'


def parameters(
  run: inference.Tokenizer | inference.ImageGenerator, ema: bool = True
) -> dict[str, Any]:
  """Describes the parameters that were measured, for a protocol."""
  return {
    'step': run.step,
    'parameters': 'EMA' if ema else 'raw',
    'run_weights': trees.weights_hash(run.params),
  }


def here() -> dict[str, Any]:
  """Describes what computed a score, for a protocol."""
  return {
    'backend': jax.default_backend(),
    'device': jax.devices()[0].device_kind,
    'version': f'{__version__}+{code_digest()}',
  }


@functools.cache
def code_digest(
  package: pathlib.Path = pathlib.Path(__file__).parents[1],
) -> str:
  """Returns eight digits that change with any line of the package's code.

  A checkout and an installed wheel of it have the same, with or without git.
  """
  found = hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    found.update(path.relative_to(package).as_posix().encode() + b'\0')
    found.update(path.read_bytes() + b'\0')
  return found.hexdigest()[:8]


def image_features(
  network: contract.FeatureNetwork,
) -> Callable[[Images], Float[Array, 'b d']]:
  """Makes a function that turns uint8 images into one vector per image.

  The vector is the network's class token or, if it has none, the mean of its
  patches; `network` is a FeatureNetwork with its parameters.
  """

  @jax.jit
  def features(
    params: PyTree, images: Num[Array, 'b h w 3']
  ) -> Float[Array, 'b d']:
    return network(params, pixels.to_float(images)).pooled

  return functools.partial(features, network.params)


def balanced_labels(count: int, num_classes: int) -> Int[np.ndarray, ' n']:
  """Returns int32 labels [count] that repeat 0, 1, ..., num_classes - 1."""
  return np.arange(count, dtype=np.int32) % num_classes


def samples_of(
  generator: inference.ImageGenerator,
  labels: Int[np.ndarray, ' n'],
  sampling: inference.Sampling,
  *,
  batch_size: int,
  seed: int,
  rounding: str = 'truncate',
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's share of samples, as {'image', 'mask'}.

  Args:
    generator: makes the samples.
    labels: classes of all samples, by index.
    sampling: settings.
    batch_size: samples of all processes at a time, rounded up to fill their
      devices.
    seed: seed of the noise.
    rounding: a key of `pixels.ROUNDINGS`.
  """
  return _made(
    lambda indices: generator.sample_uint8(
      labels[indices],
      indices=indices,
      seed=seed,
      rounding=rounding,
      **dataclasses.asdict(sampling),
    ),
    len(labels),
    batch_size,
    generator,
  )


def gaussian_codes_of(
  generator: inference.ImageGenerator,
  count: int,
  *,
  batch_size: int,
  seed: int,
  rounding: str = 'truncate',
) -> Iterator[dict[str, np.ndarray]]:
  """Yields decoded Gaussian codes of the right mean and deviation.

  A generator that has learnt nothing else would make such images. Arguments
  are those of `samples_of`.
  """
  tokenizer, statistics = generator.tokenizer, generator.statistics
  shapes = {'tokens': (tokenizer.num_tokens, tokenizer.token_dim)}

  def make(indices: Int[np.ndarray, ' b']) -> UInt8[Array, 'b h w 3']:
    rounds = []
    for part in np.split(indices, len(indices) // generator.round_size):
      noise, _ = samplers.make_noise(seed, jnp.asarray(part), shapes)
      codes = path_lib.denormalise_codes(noise['tokens'], statistics)
      rounds.append(pixels.to_uint8(generator.decode(codes), rounding))
    return jnp.concatenate(rounds)

  return _made(make, count, batch_size, generator)


def _made(
  make: Callable[[Int[np.ndarray, ' b']], UInt8[Array, 'b h w 3']],
  count: int,
  batch_size: int,
  generator: inference.ImageGenerator,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's share of images by index, padded with the last."""
  size = generator.round_size
  share = -(-batch_size // (jax.process_count() * size)) * size
  for first in range(0, count, share * jax.process_count()):
    mine = first + jax.process_index() * share + np.arange(share)
    # Padding is made too, so that every batch has one shape.
    images = make(np.minimum(mine, count - 1))
    yield {'image': np.asarray(images), 'mask': mine < count}


def sample_batches(
  generator: inference.ImageGenerator,
  labels: Int[np.ndarray, ' n'],
  batch_size: int,
  *,
  indices: Int[np.ndarray, ' m'] | None = None,
  seed: int = 0,
  guidance_scale: float | None = None,
) -> Iterator[UInt8[np.ndarray, 'b h w 3']]:
  """Yields uint8 samples in batches.

  Args:
    generator: makes the samples.
    labels: classes of all samples, by index.
    batch_size: samples at a time, rounded up to fill all devices.
    indices: the samples wanted; all of `labels` by default.
    seed: seed of the noise.
    guidance_scale: used in place of that of `generator.sampling`.
  """
  if indices is None:
    indices = np.arange(len(labels))
  if guidance_scale is None:
    guidance_scale = generator.sampling.guidance_scale
  # Rounded up: a round that is not full costs as much as a full one.
  at_a_time = -(-batch_size // generator.round_size) * generator.round_size
  for first in range(0, len(indices), at_a_time):
    chosen = indices[first : first + at_a_time]
    images = generator.sample_uint8(
      labels[chosen],
      indices=chosen,
      seed=seed,
      guidance_scale=guidance_scale,
    )
    yield np.asarray(images)


def as_text(found: Sequence[scores.Score]) -> str:
  """Describes scores by a table, what all have in common, and a line of JSON.

  The last line is the list that files of scores hold.
  """
  shared = {
    key: value
    for key, value in found[0].protocol.items()
    if all(score.protocol.get(key) == value for score in found)
  }
  rows = [
    {
      'metric': score.metric,
      'value': score.value,
      'protocol': scores.in_words(
        {k: v for k, v in score.protocol.items() if k not in shared}
      ),
    }
    for score in found
  ]
  return '\n'.join(
    [
      tables.table(rows, ['metric', 'value', 'protocol']),
      f'{found[0].run}: {scores.in_words(shared)}',
      json.dumps([dataclasses.asdict(score) for score in found]),
    ]
  )


def add_scores(
  workdir: str | os.PathLike[str], found: Sequence[scores.Score]
) -> None:
  """Writes scores into a workdir, beside those of other protocols there."""
  path = files.as_path(workdir) / SCORES
  write_file(path, _latest([*read_file(path), *found]))


def list_file(
  workdir: str | os.PathLike[str], out: str | os.PathLike[str]
) -> None:
  """Notes in a workdir that a file elsewhere has scores of its run."""
  workdir = files.as_path(workdir)
  own = os.fspath(files.absolute(out))
  listed = [entry for entry in _read_listed(workdir) if entry != own]
  files.write_json(workdir / SCORE_FILES, [*listed, own])


def write_file(path: files.Path, found: Sequence[scores.Score]) -> None:
  """Writes scores as a list of JSON objects: run, metric, value, protocol."""
  files.write_json(path, [dataclasses.asdict(score) for score in found])


def read_scores(workdir: str | os.PathLike[str]) -> list[scores.Score]:
  """Reads the scores of a run; [] if it was never measured.

  They are those of scores.json and of the files that score_files.json lists,
  as far as these are still there. Of several values of the same metric and
  protocol the last one counts.

  Raises:
    UserError: a file is damaged.
  """
  workdir = files.as_path(workdir)
  listed = _read_listed(workdir)
  paths = [workdir / SCORES, *(files.as_path(path) for path in listed)]
  return _latest([score for path in paths for score in read_file(path)])


def _read_listed(workdir: files.Path) -> list[str]:
  """Reads the paths in score_files.json; UserError if it is damaged."""
  path = workdir / SCORE_FILES
  listed = _read_json(path) or []
  if isinstance(listed, list) and all(isinstance(x, str) for x in listed):
    return listed
  raise _damaged(path)


def _latest(found: Sequence[scores.Score]) -> list[scores.Score]:
  """Leaves out scores of which there is a later one of the same protocol."""
  latest = {}
  for score in found:
    # The same measurement by newer code takes the place of the older one.
    how = {k: v for k, v in score.protocol.items() if k != 'version'}
    key = json.dumps([score.run, score.metric, how], sort_keys=True)
    latest[key] = score
  return list(latest.values())


def read_file(path: files.Path) -> list[scores.Score]:
  """Reads a file of scores; [] if there is none.

  Earlier versions wrote the protocol in words; it becomes a description.

  Raises:
    UserError: the file is damaged.
  """
  records = _read_json(path)
  with contextlib.suppress(ValueError, TypeError, KeyError):
    found = [
      scores.Score(
        record['run'],
        record['metric'],
        record['value'],
        {'description': how}
        if isinstance(how := record['protocol'], str)
        else dict(how),
      )
      for record in records or ()
    ]
    if all(
      isinstance(s.run, str)
      and isinstance(s.metric, str)
      and isinstance(s.value, int | float)
      for s in found
    ):
      return found
  raise _damaged(path)


def _read_json(path: files.Path) -> Any:
  """Reads a JSON file; None if there is none, UserError if it is damaged."""
  with files.reaching(path):
    if not path.exists():
      return None
    text = path.read_bytes()
  try:
    return json.loads(text)
  except ValueError as error:
    raise _damaged(path) from error


def _damaged(path: files.Path) -> errors.UserError:
  return errors.UserError(
    f'{path} is damaged; remove it and measure again with launch.evaluate'
  )
