"""The paper's recipe with all its terms, at a size for any machine."""

import json
import os
import pathlib

import numpy as np
import pytest

from tests.launch import commands

TERMS = (
  'pixel', 'perceptual', 'repa_global', 'repa_local', 'transport', 'kl',
)  # fmt: skip
SHARED = commands.ROOT / '..' / 'shared'


def _data() -> str:
  """Photographs, or the built-in scenes where there are none."""
  folder = pathlib.Path(os.environ.get('DATA') or SHARED / 'data')
  path = folder / 'openphoto256.tar'
  if path.exists():
    return f'--config.data.path={path}'
  assert not os.environ.get('DATA'), f'no {path.name} in DATA={folder}'
  return '--config.data.source=procedural'


@pytest.mark.slow
@pytest.mark.long
def test_every_term_learns_and_the_discriminator_starts_where_it_should(
  tmp_path,
):
  workdir = tmp_path / 'run'
  with commands.spawn(
    'train', '--config=configs/tokenizer.py:rehearsal',
    _data(), '--config.train.log_every=1', '--config.evaluation.every=0',
    f'--workdir={workdir}',
  ) as process:  # fmt: skip
    _, err = process.communicate()
  assert process.returncode == 0, err
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  logs = [log for log in map(json.loads, lines) if 'pixel' in log]
  assert [log['step'] for log in logs] == list(range(1, 51))
  for log in logs:
    assert all(np.isfinite(value) for value in log.values()), log
    # 0.4 of 50 steps; what is logged at step n is of the n-th update.
    assert ('adversarial' in log) == (log['step'] > 20), log
  for term in TERMS:
    first, last = (
      np.mean([log[term] for log in part]) for part in (logs[:5], logs[-5:])
    )
    # The perceptual one is warmed up: its log rises before it falls.
    if term == 'perceptual':
      first = np.mean([log[term] for log in logs[9:14]])
    assert last < first, term
  critic = [log['discriminator_loss'] for log in logs[20:]]
  assert np.mean(critic[-5:]) < np.mean(critic[:5])
