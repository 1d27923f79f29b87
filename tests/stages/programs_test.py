import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, presets
from selfboottok_jax.stages import dry_run, programs
from selfboottok_jax.training import optim, sharding
from selfboottok_jax.training import state as state_lib
from tests import tiny as models
from tests.launch import tiny


def _programs(task, **fields):
  config = tiny.get_config(task)
  config.data.batch_size = 8
  if task == 'tokenizer':
    config.loss.adversarial_start = 0.5
  config.model.update(fields)
  sketch = dry_run.abstract_task(config)
  return config, programs.TrainPrograms(
    config, sketch.task, sharding.make_mesh()
  )


def test_recomputation_is_no_part_of_the_model():
  plain, dots, block = (
    _programs('generator', depth=3, remat=remat)[1].card()
    for remat in ('none', 'dots', 'block')
  )
  assert plain.flops.model == dots.flops.model == block.flops.model
  # With 'dots' the products of attention alone are computed again.
  assert plain.flops.recompute == 0
  assert 0 < dots.flops.recompute < block.flops.recompute / 2


def _zeros(like):
  """A batch of zeros on its devices."""
  return jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like
  )


def _noise(like):
  """A state, or frozen parameters, on its devices; nothing is compiled."""
  return jax.tree.map_with_path(
    lambda path, x: jax.device_put(models.noise(path, x), x.sharding), like
  )


@pytest.mark.slow
def test_each_phase_is_compiled_when_it_begins():
  config, step_fn = _programs('tokenizer')
  cards = []
  step_fn.on_compile = lambda: cards.append(step_fn.card())
  state, batch = step_fn.init(), _zeros(step_fn.batch)
  assert not step_fn.compile_seconds
  for step in range(config.train.steps):
    state, metrics = step_fn(state, step_fn.frozen, batch, step)
    assert int(state.step) == step + 1
    assert ('discriminator_loss' in metrics) == (step >= 1)
    assert len(step_fn.compile_seconds) == step + 1
  # Each is of the phase that has begun.
  assert [card.first_step for card in cards] == [0, 1]
  assert cards[0].flops.model < cards[1].flops.model
  for card in cards:
    assert card.memory.temporary > 0
    assert card.devices == '8 x cpu (mesh: data 1 x fsdp 8)'


@pytest.fixture(scope='module')
def of_generator():
  """Its programs, whose step may be traced once, and frozen parameters."""
  make = state_lib.make_train_step
  chex.clear_trace_counter()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      state_lib,
      'make_train_step',
      lambda *args, **kwargs: chex.assert_max_traces(
        make(*args, **kwargs), n=1
      ),
    )
    _, step_fn = _programs('generator')
  return step_fn, _noise(step_fn.frozen)


def test_no_phase_is_traced_twice(of_generator):
  step_fn, frozen = of_generator
  state, batch = step_fn.init(), _zeros(step_fn.batch)
  for step in range(3):
    state, _ = step_fn(state, frozen, batch, step)
  assert int(state.step) == 3


@pytest.mark.slow
def test_compile_time_is_not_that_of_reading_a_cache():
  _, cached = _programs('generator', mlp_ratio=2.0)
  cached.compile(0)
  _, again = _programs('generator', mlp_ratio=2.0)
  again.compile(0)
  assert again.compile_seconds == {0: None}
  assert again.card().compile_seconds is None
  _, fresh = _programs('generator', mlp_ratio=2.0)
  with programs.no_compilation_cache():
    fresh.compile(0)
  assert fresh.compile_seconds[0] > 0
  _, last = _programs('generator', mlp_ratio=2.0)
  last.compile(0)
  assert last.compile_seconds == {0: None}


def test_other_shapes_are_an_error_not_another_program(of_generator):
  step_fn, frozen = of_generator
  batch = jax.tree.map(lambda x: jnp.zeros((16, *x.shape[1:])), step_fn.batch)
  with pytest.raises(TypeError, match='compiled'):
    step_fn(_noise(step_fn.state), frozen, batch, 0)


def test_a_hidden_transfer_is_an_error_from_the_second_call_on(of_generator):
  step_fn, frozen = of_generator
  on_host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step_fn.batch)
  state, _ = step_fn(_noise(step_fn.state), frozen, _zeros(step_fn.batch), 0)
  with pytest.raises(Exception, match='Disallowed host-to-device'):
    step_fn(state, frozen, on_host, 0)


def test_a_batch_that_does_not_divide_is_refused():
  config = tiny.get_config('generator')
  config.data.batch_size = 24
  task = dry_run.abstract_task(config).task
  config.train.accumulate = 2
  with pytest.raises(
    errors.ConfigError,
    match=r'batch_size=24 .* train.accumulate=2 .* 8 devices; .* of 16$',
  ):
    programs.TrainPrograms(config, task, sharding.make_mesh())


@pytest.mark.slow
@pytest.mark.parametrize('task', ['tokenizer', 'scaling', 'generator'])
def test_every_task_trains_in_micro_batches(task):
  config = tiny.get_config(task)
  config.data.batch_size, config.train.accumulate = 16, 2
  mesh = sharding.make_mesh()
  made = dry_run.abstract_task(config).task
  step_fn = programs.TrainPrograms(config, made, mesh)
  state = step_fn.init()
  before = jax.device_get(state.params)
  batch = jax.tree.map(
    lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding),
    step_fn.batch,
  )
  frozen = dry_run.materialise(step_fn.frozen, mesh)
  state, metrics = step_fn(state, frozen, batch, 0)
  assert all(np.isfinite(value) for value in metrics.values())
  for group in made.groups:
    after = jax.device_get(state.params[group])
    assert jax.tree.structure(after) == jax.tree.structure(before[group])
    assert any(
      np.any(a != b)
      for a, b in zip(
        jax.tree.leaves(after), jax.tree.leaves(before[group]), strict=True
      )
    )


@pytest.mark.parametrize(
  'preset', ['generator:imagenet256_xl', 'scaling:imagenet256_600m']
)
@pytest.mark.parametrize('mesh', [(-1, -1), (1, 8)])
def test_a_device_holds_an_eighth_of_the_state(preset, mesh):
  config = presets.get_config(preset)
  task = dry_run.abstract_task(config).task

  def init():
    params, stats = task.init(jax.random.key(0))
    optimizers = {
      group: optim.build_optimizer(steps=config.train.steps, **config.optimizer)
      for group in task.groups
    }
    return state_lib.init_state(params, stats, optimizers, task.ema_groups)

  state = state_lib.place_abstractly(
    jax.eval_shape(init), sharding.make_mesh(*mesh)
  )
  whole = share = 0
  for leaf in jax.tree.leaves((state.params, state.ema, state.opt)):
    whole += leaf.size * leaf.dtype.itemsize
    shape = leaf.sharding.shard_shape(leaf.shape)
    share += math.prod(shape) * leaf.dtype.itemsize
  assert whole > 5e9
  assert whole / 8 <= share < 1.05 * whole / 8


def test_what_is_computed_again_is_not_kept():
  config, step_fn = _programs('generator', depth=3)
  kept = {}
  for remat in ('none', 'dots', 'block'):
    config.model.remat = remat
    task = dry_run.abstract_task(config).task
    kept[remat] = programs.kept_bytes(task, step_fn, sharding.make_mesh(), 0)
  assert kept['none'] > kept['dots'] > kept['block'] > 0
  # A block keeps at least its input: 3 blocks of 8 images on 8 devices.
  width, tokens = config.model.width, 4
  assert kept['block'] >= 3 * 4 * width * tokens
