"""The inception score of a set of images, from a classifier's logits.

Salimans et al., "Improved Techniques for Training GANs", 2016: exp of the mean
divergence of a picture's class probabilities from their mean over the set. The
set is cut into parts, and the parts' scores are averaged. How it is cut is
convention, and changes the number.
"""

import numpy as np
from jaxtyping import Float, Int

from selfboottok_jax import errors

# Sets that come sorted by class would score far too low in consecutive parts.
SEED = 2020
# Images in a part, by ADM; number of parts, by torch-fidelity.
PART, PARTS = 5000, 10


def score_in_parts_of(
  logits: Float[np.ndarray, 'n c'], size: int = PART
) -> float:
  """The mean over consecutive parts of `size` images, the last perhaps short.

  The convention of ADM's evaluator.
  """
  if not len(logits):
    raise errors.DataError('the inception score of no images; give some')
  return float(
    np.mean([_score(logits[i : i + size]) for i in range(0, len(logits), size)])
  )


def score_in_parts(
  logits: Float[np.ndarray, 'n c'], count: int = PARTS
) -> tuple[float, float]:
  """Mean and population deviation over `count` parts of about equal size.

  The convention of torch-fidelity, which shuffles the set before; see
  `shuffle`.
  """
  n = len(logits)
  if n < count:
    raise errors.DataError(
      f'an inception score in {count} parts of {n} images; give {count} or more'
    )
  edges = [i * n // count for i in range(count + 1)]
  scores = [_score(logits[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
  return float(np.mean(scores)), float(np.std(scores))


def shuffle(count: int) -> Int[np.ndarray, 'n']:
  """The order in which torch-fidelity takes `count` images."""
  # The legacy generator is the convention.
  return np.random.RandomState(SEED).permutation(count)  # noqa: NPY002


def _score(logits: Float[np.ndarray, 'n c']) -> float:
  # Imported where it is used: it takes a tenth of a training's start.
  import scipy.special

  share = scipy.special.softmax(logits.astype(np.float64), axis=1)
  mean = share.mean(axis=0, keepdims=True)
  # 0 for a probability that underflows, where ADM's evaluator returns NaN.
  divergence = scipy.special.rel_entr(share, mean).sum(axis=1)
  return float(np.exp(divergence.mean()))
