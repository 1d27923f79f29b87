"""Two processes of one machine train as two hosts do."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.launch import commands


def _start(address, process, *arguments):
  joined = {
    'JAX_COORDINATOR_ADDRESS': address,
    'JAX_NUM_PROCESSES': '2',
    'JAX_PROCESS_ID': str(process),
  }
  return subprocess.Popen(
    [sys.executable, '-m', 'launch.train', '--multihost', *arguments],
    cwd=commands.ROOT,
    env=commands.environment() | joined,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _train_together(*arguments):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  processes = [_start(address, i, *arguments) for i in range(2)]
  ended = [process.communicate(timeout=200) for process in processes]
  for process, (_, err) in zip(processes, ended, strict=True):
    assert process.returncode == 0, err
  return [err for _, err in ended]


def _losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  records = [json.loads(line) for line in lines]
  return {r['step']: r['loss'] for r in records if 'loss' in r}


@pytest.mark.parametrize(
  'task',
  [
    'generator',
    pytest.param('tokenizer', marks=pytest.mark.slow),
    pytest.param('scaling', marks=pytest.mark.slow),
  ],
)
def test_two_processes_train_as_one(task, runs, tmp_path):
  arguments = [
    f'--config=tests/launch/tiny.py:{task}', f'--workdir={tmp_path}',
  ]  # fmt: skip
  if task != 'tokenizer':
    arguments.append(f'--config.tokenizer={runs / "tokenizer"}')
  first, second = _train_together(*arguments)
  assert 'step 2' in first
  assert 'step' not in second
  name = 'scaled' if task == 'scaling' else task
  alone, together = _losses(runs / name), _losses(tmp_path)
  assert together.keys() == alone.keys() == {1, 2}
  for step, loss in alone.items():
    np.testing.assert_allclose(together[step], loss, rtol=1e-4)
  # Both restore what both saved, and go on.
  _train_together(*arguments, '--config.train.steps=3')
  assert _losses(tmp_path).keys() == {1, 2, 3}
