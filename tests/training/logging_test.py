import contextlib
import json
import sys
import time

import pytest

from selfboottok_jax import errors, files
from selfboottok_jax.training import logging


def _write(workdir, start_step, records):
  writer = logging.MetricsWriter(str(workdir), start_step=start_step)
  with contextlib.closing(writer):
    for step, metrics in records:
      writer.write(step, metrics)


def _read(workdir):
  lines = (workdir / logging.METRICS).read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_lines_are_steps_and_values(tmp_path):
  _write(tmp_path, 0, [(1, {'loss': 0.5}), (2, {'loss': 0.25, 'x': 3.0})])
  assert _read(tmp_path) == [
    {'step': 1, 'loss': 0.5},
    {'step': 2, 'loss': 0.25, 'x': 3.0},
  ]
  assert any((tmp_path / 'tensorboard').iterdir())


def test_lines_behind_the_restored_step_are_cut(tmp_path):
  _write(tmp_path, 0, [(step, {'loss': float(step)}) for step in (2, 4, 6)])
  _write(tmp_path, 4, [(5, {'loss': 50.0})])
  assert [line['step'] for line in _read(tmp_path)] == [2, 4, 5]


def test_a_torn_last_line_is_dropped(tmp_path):
  _write(tmp_path, 0, [(2, {'loss': 1.0}), (4, {'loss': 2.0})])
  path = tmp_path / logging.METRICS
  path.write_text(path.read_text()[:-7])
  _write(tmp_path, 4, [(6, {'loss': 3.0})])
  assert [line['step'] for line in _read(tmp_path)] == [2, 6]


def test_seconds_add_up_over_sessions(tmp_path):
  path = tmp_path / logging.METRICS
  assert not path.exists()
  _write(
    tmp_path,
    0,
    [
      (1, {'seconds': 2.0}),
      (2, {'seconds': 5.0}),
      (2, {'val/psnr': 20.0}),
      (3, {'seconds': 1.0}),
      (4, {'seconds': 4.0}),
    ],
  )
  assert logging.seconds(path) == 9.0


@pytest.mark.parametrize('step', [2, 10])
def test_progress_on_a_plain_output(capsys, step):
  progress = logging.Progress(10, start=0, name='tokenizer')
  progress.advance()
  progress.show(step, {'loss': '0.5', 'images/s': '7.0'})
  progress.note('saved')
  progress.close()
  lines = capsys.readouterr().err.splitlines()
  start = f'tokenizer: step {step}/10  loss 0.5  images/s 7.0  left 0:00:'
  assert lines[0].startswith(start)
  assert lines[1:] == ['tokenizer: saved']


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  _write(tmp_path, 0, [(1, {'loss': 0.5})])
  assert _read(tmp_path) == [{'step': 1, 'loss': 0.5}]
  assert not (tmp_path / 'tensorboard').exists()
  shown = capsys.readouterr().err
  assert shown.count('\n') == 1
  assert 'tensorboardX is not installed' in shown


def _uploaded(store, workdir):
  lines = store.read(f'{workdir}/{logging.METRICS}').splitlines()
  return [json.loads(line)['step'] for line in lines]


def test_a_log_in_an_object_store(store, bucket):
  workdir = f'{bucket}/a run'
  _write(workdir, 0, [(step, {'loss': float(step)}) for step in (2, 4, 6)])
  assert _uploaded(store, workdir) == [2, 4, 6]
  _write(workdir, 4, [(5, {'loss': 50.0, 'seconds': 2.0})])
  assert _uploaded(store, workdir) == [2, 4, 5]
  assert logging.seconds(files.as_path(workdir) / logging.METRICS) == 2.0
  # Of each session, as in a folder.
  events = [n for n in store.names(workdir) if n.startswith('tensorboard/')]
  assert events
  assert all(store.read(f'{workdir}/{name}') for name in events)


def test_an_uploaded_log_is_whole_before_a_save(store, bucket):
  writer = logging.MetricsWriter(bucket, start_step=0)
  with contextlib.closing(writer):
    writer.write(1, {'loss': 1.0})
    writer.flush()
    assert _uploaded(store, bucket) == [1]
    count = len(store.log)
    writer.flush()
    # Nothing has grown.
    assert len(store.log) == count
  writer = logging.MetricsWriter(bucket, start_step=1)
  with contextlib.closing(writer):
    # A kill before the first upload loses no line of an earlier session.
    assert _uploaded(store, bucket) == [1]


def test_a_growing_log_is_uploaded_by_itself(store, bucket, monkeypatch):
  monkeypatch.setattr(logging, 'UPLOAD_EVERY', 0.05)
  writer = logging.MetricsWriter(bucket, start_step=0)
  with contextlib.closing(writer):
    writer.write(1, {'loss': 1.0})
    deadline = time.monotonic() + 60
    while _uploaded(store, bucket) != [1] and time.monotonic() < deadline:
      time.sleep(0.05)
    assert _uploaded(store, bucket) == [1]


def test_a_store_that_is_away_ends_no_training(store, bucket, monkeypatch):
  monkeypatch.setattr(logging, 'UPLOAD_EVERY', 0.05)
  name = bucket.removeprefix('gs://')
  writer = logging.MetricsWriter(bucket, start_step=0)
  with contextlib.closing(writer):
    store.buckets.remove(name)
    store.forbidden.add(name)
    writer.write(1, {'loss': 1.0})
    with pytest.raises(errors.UserError, match='cannot be reached'):
      writer.flush()
    time.sleep(0.2)
    writer.write(2, {'loss': 1.0})
    store.forbidden.remove(name)
    store.buckets.add(name)
  assert _uploaded(store, bucket) == [1, 2]


def test_names_of_earlier_versions_go_on_under_new_ones(tmp_path):
  _write(tmp_path, 0, [(1, {'loss': 1.0, 'pixel': 0.5, 'transport': 0.2})])
  writer = logging.MetricsWriter(str(tmp_path), start_step=1)
  writer.close()
  (line,) = _read(tmp_path)
  assert line == {
    'step': 1,
    'loss': 1.0,
    'loss/pixel': 0.5,
    'loss/transport': 0.2,
  }


def test_the_newest_evaluation_is_known_when_a_run_continues(tmp_path):
  lines = [(2, {'val/psnr': 20.0}), (3, {'loss': 1.0}), (4, {'val/psnr': 21.0})]
  _write(tmp_path, 0, lines)
  for start, evaluated, psnr in ((4, True, 21.0), (3, False, 20.0)):
    writer = logging.MetricsWriter(str(tmp_path), start_step=start)
    writer.close()
    assert writer.evaluated is evaluated
    assert writer.newest_evaluation['val/psnr'] == psnr
