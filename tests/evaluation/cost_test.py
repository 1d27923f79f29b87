import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import cost, flops
from selfboottok_jax.training import sharding

BATCH, WIDTH = 16, 256


def _program(params, frozen, batch):
  with jax.named_scope('one'):
    x = batch @ params['one']
  with jax.named_scope('two'):
    x = x @ frozen['two']
  return {'one': params['one'] + x.T @ x}


@pytest.fixture(scope='module')
def compiled():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  matrix = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
  params, frozen = (
    sharding.place_abstractly({name: matrix}, mesh) for name in ('one', 'two')
  )
  batch = jax.ShapeDtypeStruct(
    (BATCH, WIDTH), jnp.float32, sharding=sharding.batch_sharding(mesh)
  )
  arguments = params, frozen, batch
  traced = jax.jit(_program, donate_argnums=0).trace(*arguments)
  return traced.jaxpr, traced.lower().compile(), arguments


@pytest.fixture(scope='module')
def card(compiled):
  jaxpr, program, (params, frozen, batch) = compiled
  components = [
    cost.Component('one', params['one'], True),
    cost.Component('two', frozen['two'], False),
  ]
  return cost.Card(
    cost.count(jaxpr, components, BATCH),
    memory=cost.measure_memory(program, params, frozen, batch),
    compile_seconds=1.5,
    devices='8 x cpu',
  )


def test_rows_are_per_image(card):
  one, two, losses = card.rows
  assert one.parameters == two.parameters == WIDTH**2
  assert (one.trained, two.trained, losses.trained) == (True, False, None)
  assert one.flops == two.flops == flops.Flops(2.0 * WIDTH**2)
  # x^T x, over the whole batch.
  assert losses.flops.total * BATCH == 2 * WIDTH**2 * BATCH
  assert card.flops.total == 3 * 2 * WIDTH**2
  assert card.parameters(trained=True) == card.parameters(trained=False)


def test_memory_is_one_devices_share(card, compiled):
  assert card.memory.state == card.memory.frozen == 4 * WIDTH**2 // 4
  assert card.memory.batch == 4 * BATCH * WIDTH // 8
  # Gathered matrices at the least.
  assert card.memory.temporary > card.memory.state
  arguments = compiled[1].memory_analysis().argument_size_in_bytes
  memory = card.memory
  assert memory.state + memory.frozen + memory.batch == arguments
  assert memory.total == arguments + memory.temporary


def test_a_card_is_kept_in_a_workdir(card, tmp_path):
  cost.write(card, tmp_path)
  assert cost.read(tmp_path) == card
  bare = cost.Card(card.rows)
  cost.write(bare, tmp_path)
  assert cost.read(tmp_path) == bare


def test_a_card_is_kept_in_an_object_store(card, store, bucket):
  cost.write(card, f'{bucket}/run')
  assert store.names(bucket) == [f'run/{cost.FILE}']
  assert cost.read(f'{bucket}/run/') == card
  with pytest.raises(errors.UserError, match='cost.json cannot be read'):
    cost.read(f'{bucket}/other')


@pytest.mark.parametrize('text', [None, '{', '{}', '{"rows": [{"a": 1}]}'])
def test_a_damaged_card_is_named(text, tmp_path):
  if text is not None:
    (tmp_path / cost.FILE).write_text(text)
  with pytest.raises(errors.UserError, match='cost.json cannot be read'):
    cost.read(tmp_path)


def test_the_table_names_units_and_totals(card):
  lines = cost.table(card).splitlines()
  assert lines[2].split()[:3] == ['one', '65,536', 'trained']
  assert lines[5].split()[:2] == ['total', '131,072']
  assert 'parameters: 65,536 trained, 65,536 frozen' in lines
  assert any('GFLOPs per image' in line for line in lines)
  assert any('as compiled for 8 x cpu' in line for line in lines)
  assert lines[-1] == 'compile time: 1.5 s'
  assert not cost.sentences(cost.Card(card.rows))
  json.dumps(card.to_dict())


@pytest.mark.parametrize(
  ('kind', 'teraflops'),
  [
    ('NVIDIA H200', 989),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA L40S', 362),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H100 80GB HBM3', 989),
    ('TPU v5 lite', 197),
    ('TPU v5', 459),
    ('TPU v4', 275),
    # One of the two devices of a chip.
    ('TPU7x', 1153.5),
  ],
)
def test_peaks_of_known_devices(kind, teraflops):
  np.testing.assert_allclose(cost.peak_flops(kind), teraflops * 1e12)


@pytest.mark.parametrize('kind', ['cpu', 'NVIDIA L40', 'TPU v4 lite'])
def test_an_unknown_device_has_no_peak(kind):
  assert cost.peak_flops(kind) is None


def test_what_was_known_of_the_same_program_stays(card):
  counted = cost.Card(card.rows)
  assert cost.complete(counted, card) == card
  reread = dataclasses.replace(card, compile_seconds=None)
  assert cost.complete(reread, card) == card
  assert 'compile time' not in cost.table(reread)
  elsewhere = dataclasses.replace(reread, devices='1 x cpu')
  assert cost.complete(elsewhere, card) == elsewhere
  another = dataclasses.replace(counted, first_step=5)
  assert cost.complete(another, card) == another
