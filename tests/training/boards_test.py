import contextlib
import json
import sys
import types

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.training import boards, logging

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
CONFIG = {'task': 'tokenizer', 'train': {'steps': 3}}


class FakeRun:
  """A run at W&B that keeps what it is sent."""

  def __init__(self, **settings):
    self.settings, self.logged, self.axes = settings, [], []
    self.finished = False

  def define_metric(self, name, step_metric=None):
    self.axes.append((name, step_metric))

  def log(self, values):
    self.logged.append(values)

  def finish(self):
    self.finished = True


@pytest.fixture
def wandb(monkeypatch):
  """The package, which keeps its runs."""
  module = types.ModuleType('wandb')
  module.runs = []

  def init(**settings):
    module.runs.append(FakeRun(**settings))
    return module.runs[-1]

  module.init, module.Image = init, lambda array: ('image', array.shape)
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return module


def _write(workdir, start_step, project, *steps):
  writer = logging.MetricsWriter(
    str(workdir), start_step=start_step, config=CONFIG, wandb=project
  )
  with contextlib.closing(writer):
    for step in steps:
      writer.write(step, {'loss': 0.5, 'val/psnr': 20.0})
      writer.write_picture(step, 'reconstructions', PICTURE)


def test_a_run_that_continues_goes_on_with_its_run_at_wandb(tmp_path, wandb):
  workdir = tmp_path / 'tok'
  workdir.mkdir()
  _write(workdir, 0, 'us/tokens', 1, 2)
  _write(workdir, 1, 'us/tokens', 2)
  _write(workdir, 2, 'others', 3)
  first, again, other = wandb.runs
  assert first.settings['entity'] == 'us'
  assert first.settings['project'] == 'tokens'
  assert first.settings['name'] == 'tok'
  assert first.settings['config'] == CONFIG
  assert again.settings['id'] == first.settings['id']
  assert again.settings['resume'] == 'allow'
  assert other.settings['entity'] is None
  assert other.settings['id'] != first.settings['id']
  # Steps that come again are not behind an axis that only grows.
  assert ('*', 'step') in again.axes
  assert [values['step'] for values in again.logged] == [2, 2]
  assert first.logged[0] == {'step': 1, 'train/loss': 0.5, 'val/psnr': 20.0}
  assert first.logged[1] == {
    'step': 1,
    'val/reconstructions': ('image', (4, 4, 3)),
  }
  assert all(run.finished for run in wandb.runs)


def test_wandb_that_cannot_be_opened_is_one_line(tmp_path, wandb):
  def init(**unused):
    raise ValueError('no API key\nconfigured')

  wandb.init = init
  with pytest.raises(errors.ConfigError, match='no API key configured.*login'):
    _write(tmp_path, 0, 'tokens')
  assert not (tmp_path / boards.WANDB).exists()
  (tmp_path / boards.WANDB).write_text('{')
  with pytest.raises(errors.ConfigError, match='is damaged'):
    _write(tmp_path, 0, 'tokens')


def test_wandb_that_is_not_installed_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(errors.ConfigError, match='pip install wandb'):
    boards.import_wandb('tokens')


def test_tensorboard_has_numbers_pictures_and_the_configuration(tmp_path):
  event_pb2 = pytest.importorskip('tensorboardX.proto.event_pb2')
  record_writer = pytest.importorskip('tensorboardX')
  assert record_writer
  _write(tmp_path, 0, '', 1)
  (path,) = (tmp_path / 'tensorboard').iterdir()
  found = {}
  data = path.read_bytes()
  while data:
    # A record is its length, a checksum, the event, and a checksum.
    size = int.from_bytes(data[:8], 'little')
    event = event_pb2.Event.FromString(data[12 : 12 + size])
    data = data[16 + size :]
    found |= {value.tag: value for value in event.summary.value}
  assert found['train/loss'].simple_value == 0.5
  assert found['val/psnr'].simple_value == 20.0
  assert found['val/reconstructions'].image.height == 4
  (text,) = (v for tag, v in found.items() if tag.startswith('config'))
  assert b'| train.steps | 3 |' in text.tensor.string_val[0]


def test_the_newest_pictures_stay(tmp_path):
  def write(start, *steps):
    writer = logging.MetricsWriter(
      str(tmp_path), start_step=start, pictures_kept=2
    )
    with contextlib.closing(writer):
      for step in steps:
        writer.write_picture(step, 'grids', PICTURE)
    return sorted(int(p.stem) for p in (tmp_path / 'grids').glob('*.png'))

  assert write(0, 5) == [5]
  assert write(5, 10, 15, 100) == [15, 100]
  # Continued from step 15, after which 100 is of another future.
  assert write(15, 20) == [15, 20]
  assert json.loads((tmp_path / logging.METRICS).read_text() or '{}') == {}
