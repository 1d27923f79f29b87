"""Use of codebooks and statistics of tokens, streamed like other scores."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from selfboottok_jax.evaluation import paired, scores, transport_health
from selfboottok_jax.models import tokenizer as tokenizer_lib

USAGE, PERPLEXITY, LATENTS = 'usage', 'perplexity', 'latents'
METRICS = (USAGE, PERPLEXITY, LATENTS, transport_health.METRIC)
_MEAN = 'perplexity_mean_assignment'
PROTOCOLS = {
  USAGE: "share of codes that are some token's nearest",
  PERPLEXITY: 'exp of the entropy of nearest codes',
  _MEAN: 'exp of the entropy of the mean soft assignment',
  'latent_mean': 'over images, tokens and channels, before quantisation',
  'latent_std': 'over images, tokens and channels, before quantisation',
  **transport_health.PROTOCOLS,
}


def count_codes(
  output: tokenizer_lib.TokenizerOutput, mask: Bool[Array, 'b']
) -> dict[str, dict[str, Array]]:
  """Sums over the images of a batch, for each group of tokens.

  Returns:
    By group 'nearest' (int32 [n, v]: how often each code is some token's
    nearest), 'assigned' (float32 [n, v]: the sum of the soft assignments), and
    for each image 'mean' and 'square' [b] of its tokens.
  """
  found = {}
  for group, quantized in output.quantized.items():
    hits = jax.nn.one_hot(
      quantized.indices, quantized.codebook.shape[1], dtype=jnp.int32
    )
    tokens = output.tokens[group]
    weight = mask[:, None, None, None]
    found[group] = {
      'nearest': jnp.sum(hits * weight.astype(jnp.int32), axis=(0, 2)),
      'assigned': jnp.sum(
        quantized.probs * weight.astype(jnp.float32), axis=(0, 2)
      ),
      'mean': jnp.mean(tokens, axis=(1, 2)),
      'square': jnp.mean(jnp.square(tokens), axis=(1, 2)),
    }
  return found


class CodeStatistics:
  """Adds up what `count_codes` returns for every batch."""

  def __init__(self, metrics: Sequence[str]):
    """Starts with no image; `metrics` are of METRICS."""
    self._metrics, self.count = tuple(metrics), 0
    self._totals: dict[str, dict[str, np.ndarray]] = {}
    self._health: dict[str, float] = {}

  def add(
    self,
    counted: Mapping[str, Mapping[str, Any]],
    mask: Bool[Any, 'b'],
    health: Mapping[str, Any] | None = None,
  ) -> None:
    """Adds a batch.

    Args:
      counted: what `count_codes` returned.
      mask: False for padding.
      health: numbers of each image, see `transport_health.Health`.
    """
    mask = np.asarray(mask)
    self.count += int(mask.sum())
    for name, values in (health or {}).items():
      own = np.asarray(values, np.float64)[mask].sum()
      self._health[name] = self._health.get(name, 0.0) + float(own)
    for group, values in counted.items():
      totals = self._totals.setdefault(group, {})
      for name, value in values.items():
        own = np.asarray(value, np.float64)
        if name in ('mean', 'square'):
          own = own[mask].sum()
        totals[name] = totals[name] + own if name in totals else own

  def finish(self) -> list[paired.Measured]:
    """Returns (metric, value, its part of the protocol)."""
    values = {n: total / self.count for n, total in self._health.items()}
    every: dict[str, list[np.ndarray]] = {
      USAGE: [],
      PERPLEXITY: [],
      _MEAN: [],
    }
    for group, totals in self._totals.items():
      used, nearest = scores.usage(totals['nearest'])
      _, assigned = scores.usage(totals['assigned'])
      for name, found in zip(every, (used, nearest, assigned), strict=True):
        every[name].append(found)
        values[f'{name}_{group}'] = float(np.mean(found))
      for index, share in enumerate(used if len(used) > 1 else ()):
        values[f'{USAGE}_{group}_{index}'] = float(share)
      mean = totals['mean'] / self.count
      square = totals['square'] / self.count
      values[f'latent_mean_{group}'] = float(mean)
      values[f'latent_std_{group}'] = float(np.sqrt(square - mean**2))
    if self._totals:
      values |= {
        name: float(np.mean(np.concatenate(parts)))
        for name, parts in every.items()
      }
    # Scores of all groups together stand first.
    return [
      (name, values[name], {'description': how, 'count': self.count})
      for family, how in PROTOCOLS.items()
      if self._is_wanted(family)
      for name in sorted(values)
      if _family(name) == family
    ]

  def _is_wanted(self, family: str) -> bool:
    wanted = family.split('_')[0]
    return (LATENTS if wanted == 'latent' else wanted) in self._metrics


def _family(name: str) -> str:
  """The key of PROTOCOLS that describes a metric: the longest that fits."""
  return max((f for f in PROTOCOLS if name.startswith(f)), key=len)
