import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import content


@pytest.mark.parametrize(
  'make',
  [
    lambda: content.Score('run', 'psnr', 20.0, True, ' '),
    lambda: content.Comparison([], ''),
    lambda: content.Samples({}, ''),
  ],
)
def test_nothing_is_reported_without_its_protocol(make):
  with pytest.raises(errors.UserError, match='No protocol was given'):
    make()


def test_names_tell_runs_and_rows_apart():
  run = content.Run('twin', '/w', 'tokenizer', 1, 1.0)
  with pytest.raises(errors.UserError, match=r"different names .*'twin'"):
    content.Report(title='t', runs=[run, run])
  row = content.Reconstruction('twin', np.zeros((1, 2, 2, 3), np.uint8))
  with pytest.raises(errors.UserError, match=r"different names .*'twin'"):
    content.Comparison([row, row], 'protocol')
