import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from selfboottok_jax import errors
from selfboottok_jax.stages import jobs
from tests import processes

# A command that notes its place and its end, and may fail.
COMMAND = """
import os, pathlib, sys, time
folder, name, seconds, code = sys.argv[1:]
path = pathlib.Path(folder, name)
path.write_text(os.environ.get('PLACE', ''))
deadline = time.monotonic() + float(seconds)
while time.monotonic() < deadline and not (path.parent / 'end').exists():
  time.sleep(0.01)
if int(code):
  print('error: this is why', file=sys.stderr)
path.with_suffix('.ended').touch()
sys.exit(int(code))
"""
# Runs one endless command, as a process that is killed.
PARENT = """
import pathlib, sys
from selfboottok_jax.stages import jobs
folder = pathlib.Path(sys.argv[1])
with jobs.locked(folder) as lock:
  job = jobs.Job('a', 'command', [sys.argv[1], 'a', '600', '0'], [],
                 lambda: False)
  jobs.run([job], folder / 'logs', [{}], say=print, on_end=lambda *_: None,
           kept=lock)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
  """Makes jobs of a module that needs no imports of ours."""
  (tmp_path / 'command.py').write_text(textwrap.dedent(COMMAND))
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))

  def make(name, *, needs=(), seconds=0.0, code=0, done=False):
    arguments = [str(tmp_path), name, str(seconds), str(code)]
    return jobs.Job(name, 'command', arguments, needs, lambda: done)

  return make


def _run(tmp_path, made, places=({},)):
  ended = []
  failed = jobs.run(
    made,
    tmp_path / 'logs',
    places,
    say=lambda _: None,
    on_end=lambda job, reason: ended.append((job.name, reason)),
  )
  return failed, ended


def test_what_is_done_is_skipped_and_failures_go_no_further(command, tmp_path):
  failed, ended = _run(
    tmp_path,
    [
      command('done', done=True),
      command('bad', code=3),
      command('lost', needs=['done', 'bad']),
      command('more', needs=['lost']),
      command('good', needs=['done']),
    ],
  )
  assert not (tmp_path / 'done').exists()
  assert not (tmp_path / 'lost').exists()
  assert (tmp_path / 'good.ended').exists()
  assert failed == {
    'bad': 'this is why',
    'lost': 'needs bad, which failed',
    'more': 'needs lost, which failed',
  }
  assert dict(ended) == {'good': '', **failed}
  assert 'error: this is why' in (tmp_path / 'logs' / 'bad.log').read_text()


def test_jobs_run_side_by_side_each_in_a_place(command, tmp_path):
  places = [{'PLACE': 'first'}, {'PLACE': 'second'}]
  made = [command('a', seconds=60), command('b', seconds=60)]
  # They end when both have started. One after the other would be in one place.
  with subprocess.Popen(
    [
      *(sys.executable, '-c'),
      'import pathlib, sys, time\n'
      'folder = pathlib.Path(sys.argv[1])\n'
      'while not ((folder / "a").exists() and (folder / "b").exists()):\n'
      '  time.sleep(0.01)\n'
      '(folder / "end").touch()',
      str(tmp_path),
    ]
  ):
    failed, ended = _run(tmp_path, made, places)
  assert not failed
  assert sorted(ended) == [('a', ''), ('b', '')]
  assert (tmp_path / 'a').read_text() == 'first'
  assert (tmp_path / 'b').read_text() == 'second'


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM])
def test_no_command_outlives_the_process_that_started_it(
  command, tmp_path, number
):
  command('a')
  (tmp_path / 'parent.py').write_text(PARENT)
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join([str(tmp_path), os.getcwd()])
  }
  with subprocess.Popen(
    [sys.executable, str(tmp_path / 'parent.py'), str(tmp_path)],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  ) as parent:
    deadline = time.monotonic() + 60
    while not (tmp_path / 'a').exists() and time.monotonic() < deadline:
      time.sleep(0.02)
    (child,) = processes.children(parent.pid)
    assert processes.runs(child)
    parent.send_signal(number)
  assert processes.ended([child])
  assert not (tmp_path / 'a.ended').exists()
  # Who comes next finds the folder free.
  with jobs.locked(tmp_path):
    pass


def test_a_folder_belongs_to_one_process(tmp_path, monkeypatch):
  monkeypatch.setattr(jobs, '_PATIENCE', 0.2)
  with (
    jobs.locked(tmp_path),
    pytest.raises(errors.ConfigError, match='in use by another command'),
    jobs.locked(tmp_path),
  ):
    pass


@pytest.mark.parametrize(
  ('count', 'shares'),
  [(0, ['0', '1', '2', '5']), (2, ['0,1', '2,5']), (3, ['0', '1', '2,5'])],
)
def test_accelerators_are_shared(monkeypatch, count, shares):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda,cpu')
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0,1,2,5')
  assert jobs.share_devices(count) == [
    {'CUDA_VISIBLE_DEVICES': share} for share in shares
  ]
  assert jobs.share_devices(1) == [{}]
  with pytest.raises(errors.ConfigError, match='--jobs=5 on 4 accelerators'):
    jobs.share_devices(5)


def test_cpus_are_not_shared_out(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert jobs.share_devices(0) == [{}]
  assert jobs.share_devices(3) == [{}, {}, {}]


def test_chips_of_a_tpu_are_told_their_shape(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  monkeypatch.setenv('TPU_VISIBLE_CHIPS', '0,1,2,3')
  assert jobs.share_devices(2)[1] == {
    'TPU_VISIBLE_CHIPS': '2,3',
    'TPU_CHIPS_PER_PROCESS_BOUNDS': '1,2,1',
    'TPU_PROCESS_BOUNDS': '1,1,1',
  }


def test_commands_can_be_typed():
  job = jobs.Job('a', 'launch.train', ['--x=(1, 2)'], [], lambda: False)
  assert str(job) == "python -m launch.train '--x=(1, 2)'"
