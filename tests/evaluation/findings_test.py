import numpy as np
import pytest

from selfboottok_jax.evaluation import findings, history


@pytest.mark.parametrize(
  ('stages', 'worse'),
  [
    ([], []),
    ([('a', 20.0)], []),
    ([('a', 20.0), ('b', 20.0), ('c', 21)], []),
    ([('a', 20.0), ('b', 19.0), ('c', 21.0)], [('b', 'a')]),
    # Half mended is still worse than the best before.
    ([('a', 20.0), ('b', 18.0), ('c', 19.0)], [('b', 'a'), ('c', 'a')]),
    ([('a', 20.0), ('b', float('nan')), ('c', 20.0)], [('b', 'a')]),
    ([('a', float('nan')), ('b', 3.0), ('c', 2.0)], [('c', 'b')]),
  ],
)
def test_regressions(stages, worse):
  sentences = findings.regressions(stages)
  assert len(sentences) == len(worse)
  for sentence, (later, earlier) in zip(sentences, worse, strict=True):
    assert sentence.startswith(f'{later} reconstructs worse than {earlier}:')


def test_regressions_show_numbers_that_differ():
  (sentence,) = findings.regressions([('a', 21.4004), ('b', 21.4001)])
  assert 'PSNR 21.4001 dB against 21.4004 dB' in sentence


def _metrics(**last):
  return {
    name.replace('__', '/'): history.Series(
      np.array([1, 2]), np.array([50.0, value])
    )
    for name, value in last.items()
  }


def test_unbeaten_baselines_compare_last_scores():
  metrics = _metrics(
    val__psnr=12.0,
    val__psnr_mean_image=11.9,
    val__psnr_mean_colour=12.0,
    val__ssim=0.2,
    val__ssim_mean_image=0.35,
    loss=1.0,
    loss_mean_image=2.0,
  )
  assert findings.unbeaten_baselines('tiny', metrics) == [
    'tiny does not beat the trivial baseline "mean colour": val/psnr 12.00 '
    'against 12.00.',
    'tiny does not beat the trivial baseline "mean image": val/ssim 0.20 '
    'against 0.35.',
  ]
  assert not findings.unbeaten_baselines('none', _metrics(loss=1.0))


def test_a_score_that_is_not_a_number_beats_nothing():
  metrics = _metrics(val__psnr=float('nan'), val__psnr_mean_image=1.0)
  assert len(findings.unbeaten_baselines('broken', metrics)) == 1
