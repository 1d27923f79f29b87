import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selfboottok_jax import errors
from selfboottok_jax.training import checkpointing, optim, sharding, workdirs
from selfboottok_jax.training import state as state_lib
from tests import tiny

CONFIG = {
  'task': 'tokenizer',
  'model': {'width': 8, 'names': ('a', 'b')},
}
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
def test_round_trip_onto_a_mesh(opened, shape):
  mesh, state = sharding.make_mesh(*shape), _state()
  assert opened.latest_step() is None
  opened.save(state, META)
  opened.wait()
  assert opened.latest_step() == 3
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
  folder = tmp_path / workdirs.FOLDER
  assert sorted(p.name for p in folder.iterdir()) == ['2', '3']


def test_read_run_gives_everything_but_the_optimiser(tmp_path):
  workdir, state = str(tmp_path), _state()
  workdirs.write_config(workdir, CONFIG)
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
  workdirs.write_config(str(tmp_path), CONFIG | {'task': 'scaling'})
  with pytest.raises(errors.CheckpointError, match='no checkpoint yet'):
    checkpointing.read_run(str(tmp_path), what='tokenizer', task='tokenizer')


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(
    errors.CheckpointError, match=f'init_from={tmp_path} is no run'
  ):
    checkpointing.read_run(str(tmp_path), what='init_from')
