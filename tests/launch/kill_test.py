"""kill -9 at random steps: the run that goes on is the uninterrupted one.

KILLS (5) says how often each training is killed, every other time while a
checkpoint is written.
"""

import os
import random
import signal
import time

import pytest

from selfboottok_jax.training import checkpointing
from tests import tiny
from tests.launch import commands, logs

KILLS = int(os.environ.get('KILLS', '5'))
STEPS, SAVE_EVERY = 240, 10


def _kill_after_lines(process, count, delay) -> None:
  """Kills once so many updates are logged, and a little later."""
  # Three lines on the data come first.
  for _ in range(3 + count):
    process.stderr.readline()
  time.sleep(delay)
  process.kill()


def _kill_while_saving(process, workdir, count) -> None:
  """Kills as soon as the folder of the `count`-th save is seen unfinished."""
  folder, seen = workdir / checkpointing.FOLDER, set()
  while process.poll() is None:
    names = os.listdir(folder) if folder.is_dir() else []
    seen |= {name for name in names if 'tmp' in name}
    if len(seen) >= count:
      process.kill()
    time.sleep(0.0005)


def _kill(rng, arguments, workdir, *, saving) -> None:
  with commands.spawn('train', *arguments) as process:
    if saving:
      _kill_while_saving(process, workdir, rng.randint(1, 2))
    else:
      _kill_after_lines(process, rng.randint(1, 12), 0.02 * rng.random())
  assert process.returncode == -signal.SIGKILL


def _assert_same_runs(one, other):
  first, second = (
    checkpointing.read_run(str(workdir), what='test')
    for workdir in (one, other)
  )
  assert first.step == second.step == STEPS
  for name in ('params', 'ema', 'stats'):
    tiny.assert_same(getattr(first, name), getattr(second, name))
  tiny.assert_same(
    *(checkpointing.read_optimizer(str(run), STEPS) for run in (one, other))
  )
  assert first.meta == second.meta
  assert logs.read(one) == logs.read(other)


# Its norms remember, and it draws crops of images that are larger than 32.
DINO = (
  '--config.discriminator.kind=dino',
  '--config.data.image_size=48',
)


@pytest.mark.faults
@pytest.mark.parametrize(
  ('task', 'more'),
  [
    # The next two have its stage and its critic.
    pytest.param('tokenizer', (), id='tokenizer', marks=pytest.mark.long),
    pytest.param('tokenizer', DINO, id='dino'),
    pytest.param('scaling', (), id='scaling'),
    pytest.param('generator', (), id='generator'),
  ],
)
def test_killed_training_is_the_uninterrupted_one(
  task, more, server, runs, tmp_path
):
  arguments = [
    f'--config=tests/launch/tiny.py:{task}',
    *more,
    f'--config.train.steps={STEPS}',
    f'--config.checkpoint.every={SAVE_EVERY}',
    '--config.evaluation.every=50',
  ]
  if task == 'tokenizer':
    # The critic starts on the way.
    arguments.append('--config.loss.adversarial_start=0.4')
  else:
    arguments.append(f'--config.tokenizer={runs / "tokenizer"}')
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  result = server.run('train', *arguments, f'--workdir={whole}')
  assert result.code == 0, result.err
  arguments.append(f'--workdir={killed}')
  rng = random.Random(f'{task} {KILLS}')
  for index in range(KILLS):
    _kill(rng, arguments, killed, saving=index % 2 == 0)
  with commands.spawn('train', *arguments) as process:
    err = process.stderr.read()
  assert process.returncode == 0, err
  _assert_same_runs(whole, killed)
