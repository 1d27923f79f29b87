"""A cache that is written in parts is the one that is written whole."""

import shutil
import signal
import time

import pytest

from selfboottok_jax import data, errors
from tests.launch import commands, encodes, pictures


@pytest.mark.slow
def test_splits_may_come_one_after_the_other(server, runs, photos, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  encodes.encode(server, runs, photos, whole, '--splits=val,train')
  encodes.encode(server, runs, photos, parts, '--splits=val')
  with pytest.raises(errors.DataError, match='no train split'):
    data.open_token_cache(parts, 'train')
  encodes.encode(server, runs, photos, parts, '--splits=train')
  assert pictures.contents(parts) == pictures.contents(whole)


# Many shards that take a while together.
SCENES = (
  '--config.data.source=procedural',
  '--config.data.path=',
  '--splits=val',
  '--shards=100',
)


@pytest.fixture(scope='module')
def scenes(server, runs, tmp_path_factory):
  out = tmp_path_factory.mktemp('scenes') / 'cache'
  encodes.encode(server, runs, '', out, *SCENES)
  return out


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_stopped_command_continues_to_the_same_bytes(
  number, scenes, server, runs, tmp_path
):
  out = tmp_path / 'cache'
  # On a busy machine the command may end before the signal reaches it.
  for _ in range(8):
    shutil.rmtree(out, ignore_errors=True)
    arguments = encodes.arguments(runs, '', out, *SCENES)
    with commands.spawn('encode', *arguments) as process:
      while not list(out.glob('*.array_record')) and process.poll() is None:
        time.sleep(0.002)
      process.send_signal(number)
      err = process.stderr.read()
    if process.returncode:
      break
  assert 'Traceback' not in err
  if number == signal.SIGINT:
    assert process.returncode == 130
    assert err.endswith('error: stopped; the same command continues\n')
    assert not list(out.glob('.*'))
  with pytest.raises(errors.DataError, match='incomplete: .* of 100 shards'):
    data.open_token_cache(out, 'val')
  # Whole shards are kept; those that only look whole are made again.
  kept = sorted(out.glob('*.array_record'))
  assert 0 < len(kept) < 100
  before = {path: path.stat().st_ino for path in kept}
  pictures.truncate(kept[0])
  encodes.encode(server, runs, '', out, *SCENES)
  assert pictures.contents(out) == pictures.contents(scenes)
  assert all(path.stat().st_ino == before[path] for path in kept[1:])


@pytest.mark.slow
def test_processes_share_the_shards(scenes, runs, tmp_path):
  out = tmp_path / 'cache'
  first, second = commands.run_together(
    'encode', *encodes.arguments(runs, '', out, *SCENES)
  )
  assert '100 of 100 shards are new' in first.out
  assert 'shards' not in second.out
  assert pictures.contents(out) == pictures.contents(scenes)
