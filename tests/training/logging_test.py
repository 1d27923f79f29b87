import contextlib
import json
import sys

import pytest

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
