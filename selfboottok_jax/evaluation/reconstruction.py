"""Reconstruction scores of a tokenizer on held-out images."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Num, PyTree, UInt8

from selfboottok_jax import pixels
from selfboottok_jax.evaluation import scores
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.training import sharding
from selfboottok_jax.training import state as state_lib

# What is shown of the first batch.
SHOWN = 8
ROWS = ('original', 'reconstruction', 'global tokens only')
GLOBAL_ONLY = 'psnr_global_only'
# What a measure is: a number, or a picture of any size.
Measured: TypeAlias = float | UInt8[np.ndarray, 'h w 3']


def shown_rows(count: int) -> slice:
  """The images to show of a batch of so many: up to SHOWN, evenly spread."""
  step = max(count // SHOWN, 1)
  return slice(0, SHOWN * step, step)


class Seen(NamedTuple):
  """A batch of images and what a tokenizer made of it.

  Attributes:
    original: the images, split over the devices.
    reconstruction: theirs, rounded to bytes, likewise.
    mask: False for padding; of all processes.
    shown: images of the batch (`shown_rows`) for each of ROWS, on every
      device; the last only where groups are left out.
  """

  original: UInt8[Array, 'b h w 3']
  reconstruction: UInt8[Array, 'b h w 3']
  mask: Bool[np.ndarray, ' b']
  shown: Sequence[UInt8[Array, 'n h w 3']]


@runtime_checkable
class Observer(Protocol):
  """Anything else that is measured on the same reconstructions."""

  def begin(self) -> None:
    """Forgets an evaluation that was not finished."""

  def add(self, seen: Seen) -> None:
    """Takes in a batch; all processes call this together."""

  def finish(self) -> Iterator[tuple[str, Measured]]:
    """Yields (name, value) of the batches since `begin`."""


class Reconstruction:
  """PSNR, SSIM and codebook use on held-out images, beside two baselines.

  The baselines need no tokenizer: the mean image of the set, and each image's
  own mean colour.

  With `leave_out` it measures too what the local tokens are worth: the PSNR of
  reconstructions in which groups are replaced by constants, `stand_ins`.
  """

  def __init__(
    self,
    model: tokenizer_lib.Tokenizer,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    leave_out: bool = False,
    observers: Sequence[Observer] = (),
  ):
    """Measures on `batches`, which are iterated over at every run."""
    self._model, self._batches, self._mesh = model, batches, mesh
    self._variants = variants(model.groups) if leave_out else {}
    self._observers = observers
    everywhere = sharding.replicated(mesh)
    self._measure = jax.jit(
      functools.partial(measure_reconstruction, model, self._variants),
      out_shardings=dict.fromkeys(
        ('values', 'mask', 'histograms', 'tokens', 'shown'), everywhere
      )
      | {'reconstruction': sharding.batch_sharding(mesh)},
    )
    self._mean_image: UInt8[np.ndarray, 'h w 3'] | None = None

  def run(self, state: state_lib.TrainState) -> Iterator[tuple[str, Measured]]:
    """Yields (metric, value) of a training's EMA parameters."""
    yield from self._run(tokenizer_lib.served_params(state.params, state.ema))

  def run_params(self, params: PyTree) -> Iterator[tuple[str, float]]:
    """Yields (metric, value) of a tokenizer's parameters."""
    for name, value in self._run(params):
      assert isinstance(value, float)
      yield name, value

  def _run(self, params: PyTree) -> Iterator[tuple[str, Measured]]:
    """Yields all measures, those of the observers last."""
    if self._mean_image is None:
      self._mean_image = self._mean()
    for observer in self._observers:
      observer.begin()
    totals = scores.add_up(self._sums(params, self._stand_ins(params)))
    for name, total in totals['values'].items():
      yield name, float(total / totals['count'])
    for group, histogram in totals['histograms'].items():
      used, perplexity = scores.usage(histogram)
      yield f'codes_used_{group}', float(np.mean(used))
      for index, share in enumerate(used if len(used) > 1 else ()):
        yield f'codes_used_{group}_{index}', float(share)
      yield f'perplexity_{group}', float(np.mean(perplexity))
    for observer in self._observers:
      yield from observer.finish()

  def _stand_ins(self, params: PyTree) -> dict[str, Float[np.ndarray, 'k e']]:
    """Computes the constants that replace groups which are left out.

    They are the group's quantised tokens, position by position, averaged over
    the images of the first batch, without its padding.
    """
    if not self._variants:
      return {}
    shape = (self._model.num_tokens, self._model.token_dim)
    nothing = dict.fromkeys(
      self._variants[GLOBAL_ONLY], np.zeros(shape, np.float32)
    )
    # The same program as for every other batch: another would take as long to
    # compile as the tokenizer itself.
    (batch,) = itertools.islice(self._batches, 1)
    found = self._apply(
      params, sharding.put_batch(dict(batch), self._mesh), nothing
    )
    count = np.float32(max(np.sum(np.asarray(found['mask'])), 1))
    return {
      group: np.asarray(total) / count
      for group, total in found['tokens'].items()
    }

  def _apply(
    self,
    params: PyTree,
    batch: dict[str, Array],
    stand_ins: dict[str, Float[np.ndarray, 'k e']],
  ) -> dict[str, Any]:
    return self._measure(params, batch, self._mean_image, stand_ins)

  def _sums(
    self, params: PyTree, stand_ins: dict[str, Float[np.ndarray, 'k e']]
  ) -> Iterator[PyTree]:
    """Yields the sums over each batch, and shows it to the observers."""
    for batch in self._batches:
      placed = sharding.put_batch(dict(batch), self._mesh)
      found = self._apply(params, placed, stand_ins)
      mask = np.asarray(found['mask'])
      for observer in self._observers:
        observer.add(
          Seen(placed['image'], found['reconstruction'], mask, found['shown'])
        )
      yield {
        # In float64, image by image: the same on any number of devices.
        'values': {
          name: np.sum(np.asarray(values, np.float64)[mask])
          for name, values in found['values'].items()
        },
        'count': np.sum(mask),
        'histograms': found['histograms'],
      }

  def _mean(self) -> UInt8[np.ndarray, 'h w 3']:
    """Computes the mean image over all processes, rounded to uint8."""

    @functools.partial(jax.jit, out_shardings=sharding.replicated(self._mesh))
    def sums(
      batch: dict[str, Array],
    ) -> tuple[Float[Array, 'h w 3'], Float[Array, '']]:
      weight = batch['mask'].astype(jnp.float32)
      images = batch['image'].astype(jnp.float32)
      # Bytes that are summed as bfloat16 would lose their last bits.
      total = jnp.einsum(
        'b,bhwc->hwc', weight, images, precision=jax.lax.Precision.HIGHEST
      )
      return total, jnp.sum(weight)

    total, count = scores.add_up(
      sums(sharding.put_batch(dict(batch), self._mesh))
      for batch in self._batches
    )
    return np.round(total / count).astype(np.uint8)


def variants(groups: Sequence[str]) -> dict[str, tuple[str, ...]]:
  """The local groups to leave out, by the name of the PSNR without them.

  Args:
    groups: those of a tokenizer; the first is the global one.
  """
  local = tuple(groups[1:])
  every: dict[str, tuple[str, ...]] = {
    f'psnr_without_{group}': (group,) for group in local
  }
  return every | ({GLOBAL_ONLY: local} if local else {})


def measure_reconstruction(
  model: tokenizer_lib.Tokenizer,
  left_out: Mapping[str, tuple[str, ...]],
  params: PyTree,
  batch: dict[str, Array],
  mean_image: Num[Array, 'h w 3'] | Num[np.ndarray, 'h w 3'],
  stand_ins: Mapping[str, Float[Array, 'k e']],
) -> dict[str, Any]:
  """Scores each image of a batch, and counts how often codes are chosen.

  Args:
    model: the tokenizer.
    left_out: names of further PSNRs, each with the groups that it does without.
    params: parameters of the model.
    batch: images and their mask.
    mean_image: that of the set.
    stand_ins: replace the tokens of groups that are left out.

  Returns:
    'values', scores by name [b]; 'mask'; 'histograms' of nearest codes by
    group; 'tokens', sums over images of the quantised tokens of groups that are
    left out; 'reconstruction'; and 'shown', see `Seen`.
  """
  original, mask = batch['image'], batch['mask']
  module: Any = model
  apply = functools.partial(module.apply, {'params': params})
  _, _, quantized = apply(pixels.to_float(original), method='tokenize')
  codes = {group: q.codes for group, q in quantized.items()}

  def render(codes: Mapping[str, Array]) -> UInt8[Array, 'b h w 3']:
    return pixels.to_uint8(apply(codes, method='render'), 'round')

  if left_out:
    # One group may be all that are local: it is decoded once.
    distinct = [(), *dict.fromkeys(left_out.values())]
    replaced = [
      codes
      | {g: jnp.broadcast_to(stand_ins[g], codes[g].shape) for g in groups}
      for groups in distinct
    ]
    # A loop has the decoder in the program once.
    made = jax.lax.map(render, jax.tree.map(lambda *x: jnp.stack(x), *replaced))
    without = {n: made[distinct.index(out)] for n, out in left_out.items()}
    reconstruction = made[0]
  else:
    without, reconstruction = {}, render(codes)
  values = scores.image_scores(original, reconstruction)
  values |= scores.baseline_scores(original, jnp.asarray(mean_image))
  values |= {n: scores.psnr(original, other) for n, other in without.items()}
  weight = mask.astype(jnp.float32)
  histograms = {
    group: jnp.sum(
      jax.nn.one_hot(q.indices, model.codebook_size)
      * weight[:, None, None, None],
      axis=(0, 2),
    )
    for group, q in quantized.items()
  }
  shown = [original, reconstruction]
  if GLOBAL_ONLY in without:
    shown.append(without[GLOBAL_ONLY])
  exact = jax.lax.Precision.HIGHEST
  return {
    'values': values,
    'mask': mask,
    'histograms': histograms,
    'tokens': {
      group: jnp.einsum('b,bke->ke', weight, codes[group], precision=exact)
      for group in stand_ins
    },
    'reconstruction': reconstruction,
    'shown': [images[shown_rows(len(mask))] for images in shown],
  }
