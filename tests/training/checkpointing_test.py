import contextlib
import functools
import json
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selfboottok_jax import errors
from selfboottok_jax.training import checkpointing, optim, sharding
from selfboottok_jax.training import state as state_lib
from tests import tiny

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
  (tmp_path / checkpointing.CONFIG).write_text(damage)
  with pytest.raises(errors.CheckpointError, match='is damaged'):
    checkpointing.read_config(str(tmp_path), 'tokenizer')


def test_config_that_is_no_text(tmp_path):
  (tmp_path / checkpointing.CONFIG).write_bytes(b'\xff\xfe\x00')
  with pytest.raises(errors.CheckpointError, match='is damaged'):
    checkpointing.read_config(str(tmp_path), 'tokenizer')


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
  checkpointing.write_config(str(tmp_path), CONFIG)
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
  checkpointing.write_config(str(tmp_path), CONFIG)
  other = _with(model__width=16)
  checkpointing.write_config(str(tmp_path), other)
  stored = checkpointing.read_config(str(tmp_path), '--workdir')
  assert stored['model']['width'] == 16


def test_another_configuration_is_refused_and_nothing_written(begun):
  path = begun / checkpointing.CONFIG
  before = path.read_bytes()
  other = _with(model__width=16, train__seed=1, train__steps=20)
  with pytest.raises(errors.CheckpointError) as caught:
    checkpointing.write_config(str(begun), other)
  message = str(caught.value)
  assert 'model.width: 8 there, 16 given' in message
  assert 'train.seed: 0 there, 1 given' in message
  assert 'train.steps' not in message
  assert path.read_bytes() == before
  assert not list(begun.glob('*.partial'))


def test_a_key_that_older_runs_lack_is_what_they_did(begun):
  with pytest.raises(
    errors.CheckpointError, match='train.accumulate: 1 there, 2 given'
  ):
    checkpointing.write_config(str(begun), _with(train__accumulate=2))


def test_many_changes_are_counted(begun):
  other = CONFIG | {'model': dict.fromkeys('pqrstu', 1)}
  with pytest.raises(errors.CheckpointError, match='and 4 more'):
    checkpointing.write_config(str(begun), other)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'train__steps': 99},
    {'train__log_every': 1},
    {'mesh__fsdp': 4},
    {'checkpoint__every': 7},
    {'evaluation__every': 7},
    # Older runs lack the key.
    {'train__accumulate': 1},
  ],
)
def test_what_a_continued_run_may_change(begun, changes):
  changed = _with(**changes)
  checkpointing.write_config(str(begun), changed)
  stored = checkpointing.read_config(str(begun), '--workdir')
  assert stored == json.loads(json.dumps(changed))


META = {'seed': 0, 'class_names': ['x', 'y'], 'data_fingerprint': 'abc'}


def _state(step=3, seed=0):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {
    'tokenizer': {'w': normal(256, 128), 'b': normal(5)},
    'base': {'u': normal(3).astype(jnp.bfloat16)},
  }
  optimizer = optim.Optimizer(optax.scale_by_adam(), lambda step: 0.1)
  state = state_lib.init_state(
    params, {'mean': normal()}, {'tokenizer': optimizer}, ('tokenizer',)
  )
  opt = jax.tree.map(lambda a: a + 1, state.opt)
  return state.replace(step=jnp.int32(step), opt=opt)


@pytest.fixture
def opened(tmp_path):
  checkpointer = checkpointing.Checkpointer(str(tmp_path), max_to_keep=2)
  with contextlib.closing(checkpointer):
    yield checkpointer


@pytest.mark.parametrize('shape', [(8, 1), (4, 2)])
def test_round_trip_onto_a_mesh(opened, shape, tmp_path):
  mesh, state = sharding.make_mesh(*shape), _state()
  assert checkpointing.latest_step(str(tmp_path)) is None
  opened.save(state, META)
  opened.wait()
  assert checkpointing.latest_step(str(tmp_path)) == 3
  abstract = sharding.place_abstractly(state, mesh)
  restored, meta = opened.restore(abstract, 3)
  tiny.assert_same(restored, state)
  assert meta == {**META, 'step': 3}
  for leaf, wanted in zip(
    jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True
  ):
    assert leaf.dtype == wanted.dtype
    assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_keeps_the_newest_and_saves_a_step_once(opened):
  for step in (1, 2, 3):
    opened.save(_state(step, seed=step), META)
  # Evaluation and a stop can be due at once.
  opened.save(_state(3, seed=9), META)
  opened.wait()
  state = _state(3, seed=3)
  restored, _ = opened.restore(
    sharding.place_abstractly(state, sharding.make_mesh()), 3
  )
  tiny.assert_same(restored, state)


def test_max_to_keep(opened, tmp_path):
  for step in (1, 2, 3):
    opened.save(_state(step), META)
  opened.wait()
  folder = tmp_path / checkpointing.FOLDER
  assert sorted(p.name for p in folder.iterdir()) == ['2', '3']


def test_read_run_gives_everything_but_the_optimiser(tmp_path):
  workdir, state = str(tmp_path), _state()
  checkpointing.write_config(workdir, CONFIG)
  checkpointer = checkpointing.Checkpointer(workdir, max_to_keep=1)
  with contextlib.closing(checkpointer):
    checkpointer.save(state, META)
  run = checkpointing.read_run(workdir, what='tokenizer', task='tokenizer')
  assert run.step == 3
  assert run.meta == {**META, 'step': 3}
  assert run.config['model'] == {'width': 8, 'names': ['a', 'b']}
  for name in ('params', 'ema', 'stats'):
    tiny.assert_same(getattr(run, name), getattr(state, name))
  moments = checkpointing.read_optimizer(workdir, 3)['tokenizer']
  leaves = jax.tree.leaves(moments)
  for a, b in zip(leaves, jax.tree.leaves(state.opt['tokenizer']), strict=True):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(errors.CheckpointError, match="wanted a run of task 'gen"):
    checkpointing.read_run(workdir, what='generator', task='generator')


def test_a_scaled_run_serves_as_a_tokenizer(tmp_path):
  checkpointing.write_config(str(tmp_path), CONFIG | {'task': 'scaling'})
  with pytest.raises(errors.CheckpointError, match='no checkpoint yet'):
    checkpointing.read_run(str(tmp_path), what='tokenizer', task='tokenizer')


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(
    errors.CheckpointError, match=f'init_from={tmp_path} is no run'
  ):
    checkpointing.read_run(str(tmp_path), what='init_from')


def _save(workdir, *states):
  checkpointing.write_config(workdir, CONFIG)
  checkpointer = checkpointing.Checkpointer(workdir, max_to_keep=2)
  with contextlib.closing(checkpointer):
    for state in states:
      checkpointer.save(state, META)


def test_any_checkpoint_that_is_kept_is_read(tmp_path):
  states = [_state(step, seed=step) for step in (1, 2, 5)]
  # The means of the parameters lag behind them.
  states = [
    s.replace(ema=jax.tree.map(lambda leaf: leaf / 2, s.ema)) for s in states
  ]
  _save(str(tmp_path), *states)
  assert checkpointing.kept_steps(str(tmp_path)) == [2, 5]
  assert checkpointing.kept_steps(str(tmp_path / 'absent')) == []
  read = functools.partial(checkpointing.read_run, str(tmp_path), what='flag')
  assert read().step == 5
  run = read(step=2)
  assert run.step == run.meta['step'] == 2
  tiny.assert_same(run.params, states[1].params)
  tiny.assert_same(run.ema, states[1].ema)
  raw = read(step=2, ema=False)
  tiny.assert_same(raw.params, run.params)
  tiny.assert_same(raw.ema, {'tokenizer': run.params['tokenizer']})
  with pytest.raises(
    errors.CheckpointError, match=r'flag=.* step 1; wanted one of 2, 5$'
  ):
    read(step=1)


def test_a_run_in_an_object_store(store, bucket):
  workdir = f'{bucket}/a run'
  assert checkpointing.latest_step(workdir) is None
  _save(workdir, *(_state(step, seed=step) for step in (1, 2, 3)))
  steps = {name.split('/')[1] for name in store.names(workdir)[:-1]}
  assert steps == {'2', '3'}
  state = _state(3, seed=3)
  run = checkpointing.read_run(f'{workdir}/', what='tokenizer')
  assert run.step == 3
  tiny.assert_same(run.params, state.params)
  # A save that was cut off is none, and is made again.
  store.remove(f'{workdir}/{checkpointing.FOLDER}/3/commit_success.txt')
  assert checkpointing.latest_step(workdir) == 2
  checkpointer = checkpointing.Checkpointer(workdir, max_to_keep=2)
  abstract = sharding.place_abstractly(state, sharding.make_mesh(4, 2))
  with contextlib.closing(checkpointer):
    restored, meta = checkpointer.restore(abstract, 2)
    tiny.assert_same(restored, _state(2, seed=2))
    assert meta == {**META, 'step': 2}
    checkpointer.save(state, META)
  assert checkpointing.latest_step(workdir) == 3
  moments = checkpointing.read_optimizer(workdir, 3)['tokenizer']
  assert jax.tree.leaves(moments)


def test_an_import_in_an_object_store(bucket):
  # Without an optimiser, and so without arrays of one.
  state = _state().replace(opt={})
  _save(bucket, state)
  run = checkpointing.read_run(bucket, what='tokenizer')
  tiny.assert_same(run.params, state.params)
  checkpointer = checkpointing.Checkpointer(bucket, max_to_keep=2)
  with contextlib.closing(checkpointer):
    abstract = sharding.place_abstractly(state, sharding.make_mesh())
    restored, _ = checkpointer.restore(abstract, 3)
  tiny.assert_same(restored, state)


def test_a_run_may_be_copied_into_a_store(begun, store, bucket):
  store.upload(begun, f'{bucket}/copied')
  run = checkpointing.read_run(f'{bucket}/copied', what='tokenizer')
  assert run.step == 0


def test_a_store_that_is_away_is_no_new_run(store):
  store.forbidden.add('away-bucket')
  for call in (
    lambda: checkpointing.latest_step('gs://away-bucket/run'),
    lambda: checkpointing.check_config('gs://away-bucket/run', CONFIG),
    lambda: checkpointing.read_config('gs://away-bucket/run', 'tokenizer'),
    lambda: checkpointing.Checkpointer('gs://away-bucket/run', max_to_keep=1),
  ):
    with pytest.raises(errors.UserError, match='away-bucket/.*be reached'):
      call()


def test_a_run_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  _save('~/runs/tok', _state())
  _save('runs/relative', _state())
  for name in ('tok', 'relative'):
    config = tmp_path / 'runs' / name / checkpointing.CONFIG
    assert config.is_file()
    assert checkpointing.read_run(f'~/runs/{name}', what='tokenizer').step == 3
  assert not (tmp_path / '~').exists()


READ_ALONE = """
import pathlib, sys, time
import jax

workdir, address, index = sys.argv[1:]
jax.distributed.initialize(address, 2, int(index))
assert jax.process_count() == 2
done = pathlib.Path(workdir, 'done')
if index == '0':
  from selfboottok_jax.training import checkpointing

  run = checkpointing.read_run(workdir, what='tokenizer')
  print(run.step, run.ema, run.params)
  done.touch()
while not done.exists():
  time.sleep(0.1)
"""


@pytest.mark.slow
def test_a_run_is_read_without_the_other_processes(begun):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{free.getsockname()[1]}'
  readers = [
    subprocess.Popen(
      [sys.executable, '-c', READ_ALONE, str(begun), address, str(index)],
      stdout=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  try:
    ended = [reader.communicate(timeout=300) for reader in readers]
  finally:
    for reader in readers:
      reader.kill()
  assert [reader.returncode for reader in readers] == [0, 0]
  assert ended[0][0].startswith('0 ')
