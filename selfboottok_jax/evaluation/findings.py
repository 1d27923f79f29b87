"""What the numbers say against a run, in sentences."""

import math
from collections.abc import Sequence

from selfboottok_jax.evaluation import history

# Metrics compared with trivial predictors; of all of them more is better.
BASELINED = ('val/psnr', 'val/ssim')


def regressions(stages: Sequence[tuple[str, float | int]]) -> list[str]:
  """A sentence for each stage that reconstructs worse than an earlier one.

  Args:
    stages: (label, PSNR in dB) in the order in which the stages were trained.

  Each stage is compared with the best one before it, so a stage that mends
  only half of a loss is named too. A PSNR that is not a number counts as
  worse. No sentence means that every stage is at least as good as the one
  before it.
  """
  sentences = []
  best_label, best = '', -math.inf
  for label, psnr in stages:
    if best_label and not psnr >= best:
      later, earlier = _apart(psnr, best)
      sentences.append(
        f'{label} reconstructs worse than {best_label}: PSNR {later} dB '
        f'against {earlier} dB.'
      )
    elif not math.isnan(psnr):
      best_label, best = label, psnr
  return sentences


def unbeaten_baselines(run: str, metrics: history.Metrics) -> list[str]:
  """A sentence for each trivial baseline that a run's last score is not above.

  Baselines are logged beside their metric; see `history.baselines`.
  """
  sentences = []
  for name in BASELINED:
    if name not in metrics:
      continue
    last = float(metrics[name].values[-1])
    for label, value in history.baselines(name, metrics).items():
      if not last > value:
        own, trivial = _apart(last, value)
        sentences.append(
          f'{run} does not beat the trivial baseline "{label}": {name} {own} '
          f'against {trivial}.'
        )
  return sentences


def _apart(a: float | int, b: float | int) -> tuple[str, str]:
  """Both numbers with two digits, or as many as tell them apart."""
  for digits in range(2, 7):
    pair = f'{a:.{digits}f}', f'{b:.{digits}f}'
    if pair[0] != pair[1] or a == b:
      return pair
  return f'{a}', f'{b}'
