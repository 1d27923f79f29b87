import contextlib
import json

import jax.numpy as jnp
import optax
import pytest

from selfboottok_jax import errors
from selfboottok_jax.training import checkpointing, optim, workdirs
from selfboottok_jax.training import state as state_lib

CONFIG = {
  'task': 'tokenizer',
  'model': {'width': 8, 'names': ('a', 'b')},
  'train': {'steps': 10, 'seed': 0, 'log_every': 5},
  'mesh': {'data': -1, 'fsdp': 1},
  'checkpoint': {'every': 5},
  'evaluation': {'every': 5},
}


@pytest.mark.parametrize('damage', ['', '{"task": ', '\x00\x01', '[]', '{}'])
def test_damaged_config(tmp_path, damage):
  (tmp_path / workdirs.CONFIG).write_text(damage)
  with pytest.raises(errors.CheckpointError, match='is damaged'):
    workdirs.read_config(str(tmp_path), 'tokenizer')


def test_config_that_is_no_text(tmp_path):
  (tmp_path / workdirs.CONFIG).write_bytes(b'\xff\xfe\x00')
  with pytest.raises(errors.CheckpointError, match='is damaged'):
    workdirs.read_config(str(tmp_path), 'tokenizer')


def _with(**changes):
  """CONFIG with dotted keys changed."""
  config = json.loads(json.dumps(CONFIG))
  for key, value in changes.items():
    section, name = key.split('__')
    config[section][name] = value
  return config


@pytest.fixture
def begun(tmp_path):
  """A workdir with a configuration and a checkpoint."""
  workdirs.write_config(str(tmp_path), CONFIG)
  optimizer = optim.Optimizer(optax.identity(), lambda step: 0.1)
  state = state_lib.init_state(
    {'tokenizer': {'w': jnp.zeros(3)}}, {}, {'tokenizer': optimizer}, ()
  )
  with contextlib.closing(
    checkpointing.Checkpointer(str(tmp_path), max_to_keep=1)
  ) as checkpointer:
    checkpointer.save(state, {})
  return tmp_path


def test_a_run_without_a_checkpoint_may_begin_again(tmp_path):
  workdirs.write_config(str(tmp_path), CONFIG)
  other = _with(model__width=16)
  workdirs.write_config(str(tmp_path), other)
  stored = workdirs.read_config(str(tmp_path), '--workdir')
  assert stored['model']['width'] == 16


def test_another_configuration_is_refused_and_nothing_written(begun):
  path = begun / workdirs.CONFIG
  before = path.read_bytes()
  other = _with(model__width=16, train__seed=1, train__steps=20)
  with pytest.raises(errors.CheckpointError) as caught:
    workdirs.write_config(str(begun), other)
  message = str(caught.value)
  assert 'model.width: 8 there, 16 given' in message
  assert 'train.seed: 0 there, 1 given' in message
  assert 'train.steps' not in message
  assert path.read_bytes() == before
  assert not list(begun.glob('*.partial'))


def test_many_changes_are_counted(begun):
  other = CONFIG | {'model': dict.fromkeys('pqrstu', 1)}
  with pytest.raises(errors.CheckpointError, match='and 4 more'):
    workdirs.write_config(str(begun), other)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'train__steps': 99},
    {'train__log_every': 1},
    {'mesh__fsdp': 4},
    {'checkpoint__every': 7},
    {'evaluation__every': 7},
  ],
)
def test_what_a_continued_run_may_change(begun, changes):
  changed = _with(**changes)
  workdirs.write_config(str(begun), changed)
  stored = workdirs.read_config(str(begun), '--workdir')
  assert stored == json.loads(json.dumps(changed))
