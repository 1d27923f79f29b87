"""Reconstruction scores of a tokenizer on held-out images."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Num, PyTree, UInt8

from selfboottok_jax import pixels
from selfboottok_jax.evaluation import scores
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.training import sharding
from selfboottok_jax.training import state as state_lib


class Reconstruction:
  """PSNR, SSIM and codebook use on held-out images, beside two baselines.

  The baselines need no tokenizer: the mean image of the set, and each image's
  own mean colour.
  """

  def __init__(
    self,
    model: tokenizer_lib.Tokenizer,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
  ):
    """Measures on `batches`, which are iterated over at every run."""
    self._model, self._batches, self._mesh = model, batches, mesh
    self._measure = jax.jit(
      functools.partial(measure_reconstruction, model),
      out_shardings=sharding.replicated(mesh),
    )
    self._mean_image: UInt8[np.ndarray, 'h w 3'] | None = None

  def run(self, state: state_lib.TrainState) -> Iterator[tuple[str, float]]:
    """Yields (metric, value) of a training's EMA parameters."""
    yield from self.run_params(
      tokenizer_lib.served_params(state.params, state.ema)
    )

  def run_params(self, params: PyTree) -> Iterator[tuple[str, float]]:
    """Yields (metric, value) of a tokenizer's parameters."""
    if self._mean_image is None:
      self._mean_image = self._mean()
    totals = scores.add_up(
      self._measure(
        params, sharding.put_batch(dict(batch), self._mesh), self._mean_image
      )
      for batch in self._batches
    )
    for name, total in totals['scores'].items():
      yield name, float(total / totals['count'])
    for group, histogram in totals['histograms'].items():
      used, perplexity = scores.usage(histogram)
      yield f'codes_used_{group}', float(np.mean(used))
      for index, share in enumerate(used if len(used) > 1 else ()):
        yield f'codes_used_{group}_{index}', float(share)
      yield f'perplexity_{group}', float(np.mean(perplexity))

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


def measure_reconstruction(
  model: tokenizer_lib.Tokenizer,
  params: PyTree,
  batch: dict[str, Array],
  mean_image: Num[Array, 'h w 3'] | Num[np.ndarray, 'h w 3'],
) -> dict[str, Any]:
  """Sums scores over a batch, and counts how often codes are chosen."""
  original, mask = batch['image'], batch['mask']
  output: Any = model.apply({'params': params}, pixels.to_float(original))
  reconstruction = pixels.to_uint8(output.reconstruction, 'round')
  values = scores.image_scores(original, reconstruction)
  values |= scores.baseline_scores(original, jnp.asarray(mean_image))
  weight = mask.astype(jnp.float32)
  histograms = {
    group: jnp.sum(
      jax.nn.one_hot(quantized.indices, model.codebook_size)
      * weight[:, None, None, None],
      axis=(0, 2),
    )
    for group, quantized in output.quantized.items()
  }
  return {
    'scores': {name: jnp.sum(v * weight) for name, v in values.items()},
    'count': jnp.sum(weight),
    'histograms': histograms,
  }
