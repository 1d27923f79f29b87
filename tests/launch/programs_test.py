import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import programs
from launch.builders import outline
from selfboottok_jax.training import sharding
from tests.launch import tiny


def _programs(task, **fields):
  config = tiny.get_config(task)
  config.data.batch_size = 8
  config.loss.adversarial_start = 0.5
  config.model.update(fields)
  sketch = outline.outline(config)
  return config, programs.TrainPrograms(
    config, sketch.task, sketch.optimizers, sharding.make_mesh()
  )


@pytest.mark.parametrize(
  ('field', 'values'), [('unroll', (1, 3)), ('remat', (False, True))]
)
def test_how_blocks_run_changes_no_count(field, values):
  plain, other = (
    _programs('tokenizer', decoder_depth=3, **{field: value})[1].card()
    for value in values
  )
  assert other.flops.model == plain.flops.model
  assert plain.flops.recompute == 0
  if field == 'unroll':
    assert other == plain
  else:
    assert other.flops.recompute > 0


@pytest.fixture(scope='module')
def of_tokenizer():
  return _programs('tokenizer')


def test_each_phase_is_compiled_when_it_begins(of_tokenizer):
  config, step_fn = of_tokenizer
  cards = []
  step_fn.on_compile = lambda: cards.append(step_fn.card())
  state = step_fn.init()
  batch = jax.tree.map(
    lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding),
    step_fn.batch,
  )
  assert not step_fn.compile_seconds
  for step in range(config.train.steps):
    state, metrics = step_fn(state, step_fn.frozen, batch, step)
    assert int(state.step) == step + 1
    assert ('discriminator_loss' in metrics) == (step >= 1)
    assert len(step_fn.compile_seconds) == step + 1
  # The memory is that of the last phase.
  assert [card.memory is None for card in cards] == [True, False]
  assert cards[1].devices == '8 x cpu (mesh: data 8 x fsdp 1)'


def test_other_shapes_are_an_error_not_another_program(of_tokenizer):
  _, step_fn = of_tokenizer
  batch = jax.tree.map(lambda x: jnp.zeros((16, *x.shape[1:])), step_fn.batch)
  with pytest.raises(TypeError, match='compiled'):
    step_fn(step_fn.init(), step_fn.frozen, batch, 0)


def test_a_hidden_transfer_is_an_error_from_the_second_call_on(of_tokenizer):
  _, step_fn = of_tokenizer
  on_host = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), step_fn.batch)
  placed = jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding), on_host, step_fn.batch
  )
  state, _ = step_fn(step_fn.init(), step_fn.frozen, placed, 0)
  with pytest.raises(Exception, match='Disallowed host-to-device'):
    step_fn(state, step_fn.frozen, on_host, 0)
