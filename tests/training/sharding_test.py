import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfboottok_jax import errors, placement
from selfboottok_jax.training import sharding
from tests import hlo


@pytest.mark.parametrize(
  ('data', 'fsdp', 'shape'),
  [
    (-1, 1, (8, 1)),
    (-1, 2, (4, 2)),
    (2, 4, (2, 4)),
    (1, 8, (1, 8)),
    (4, -1, (4, 2)),
    (-1, -1, (1, 8)),
  ],
)
def test_meshes(data, fsdp, shape):
  mesh = sharding.make_mesh(data, fsdp)
  assert mesh.devices.shape == shape
  assert mesh.axis_names == sharding.AXES
  assert list(mesh.devices.ravel()) == jax.devices()


def test_parameters_are_shared_within_a_machine(monkeypatch):
  assert sharding.make_mesh(devices=jax.devices()[:6]).devices.shape == (1, 6)
  monkeypatch.setattr(sharding, 'MOST_SHARING', 3)
  assert sharding.make_mesh().devices.shape == (4, 2)
  assert sharding.make_mesh(devices=jax.devices()[:5]).devices.shape == (5, 1)


@pytest.mark.parametrize(
  ('data', 'fsdp'),
  [
    *((3, 1), (4, 1), (-1, 3), (0, 8), (8, 0), (-1, 16), (-2, 1)),
    *((3, -1), (0, -1), (16, -1), (-2, -1), (-1, -2)),
  ],
)
def test_meshes_that_are_not_the_devices(data, fsdp):
  with pytest.raises(errors.ConfigError, match='8 devices'):
    sharding.make_mesh(data, fsdp)


def test_a_mesh_of_chosen_devices():
  mesh = sharding.make_mesh(devices=jax.devices()[2:4])
  assert list(mesh.devices.ravel()) == jax.devices()[2:4]


@pytest.mark.parametrize(
  ('path', 'shape', 'fsdp', 'expected'),
  [
    ("['w']", (256, 512), 2, P(None, 'fsdp')),
    ("['w']", (512, 256), 2, P('fsdp')),
    ("['w']", (256, 256), 2, P('fsdp')),
    # The longest axis that divides.
    ("['w']", (511, 256), 2, P(None, 'fsdp')),
    ("['w']", (511, 255), 2, P()),
    # Small, or nothing to shard over.
    ("['w']", (64, 64), 2, P()),
    ("['w']", (2**14,), 2, P('fsdp')),
    ("['w']", (2**14 - 2,), 2, P()),
    ("['w']", (256, 512), 1, P()),
    ("['w']", (), 2, P()),
    # The first axis of a scanned stack is the layers'.
    ("['blocks']['block']['w']", (512, 256, 128), 2, P(None, 'fsdp')),
    ("['blocks']['block']['b']", (2**15,), 2, P()),
    ("['block_0']['w']", (512, 256), 2, P('fsdp')),
    # Size is that of a block: this one is of 2**13.
    ("['blocks']['block']['w']", (64, 64, 128), 2, P()),
  ],
)
def test_shape_rule(path, shape, fsdp, expected):
  assert placement.shape_rule(path, shape, fsdp) == expected


def test_the_rule_reaches_every_leaf_of_a_state():
  mesh = sharding.make_mesh(4, 2)
  tree = {
    'encoder': {
      'blocks': {'w': jax.ShapeDtypeStruct((4, 128, 256), jnp.float32)},
      'out': jnp.zeros((256, 64)),
    },
    'step': jnp.zeros((), jnp.int32),
  }
  shardings = sharding.tree_shardings(tree, mesh)
  assert shardings['encoder']['blocks']['w'].spec == P(None, None, 'fsdp')
  assert shardings['encoder']['out'].spec == P('fsdp')
  assert shardings['step'].spec == P()
  placed = jax.device_put(tree['encoder']['out'], shardings['encoder']['out'])
  assert {s.data.shape for s in placed.addressable_shards} == {(128, 64)}


@pytest.mark.parametrize(
  ('data', 'fsdp', 'shape', 'expected'),
  [
    (1, 8, (256, 512), P(None, 'fsdp')),
    (8, 1, (256, 512), P(None, ('fsdp', 'data'))),
    (2, 4, (256, 512), P(None, ('fsdp', 'data'))),
    # Divides by 4 and not by 8: each share is then on two devices.
    (2, 4, (252, 124), P('fsdp')),
    (8, 1, (252, 124), P()),
    (2, 4, (64, 64), P()),
  ],
)
def test_what_only_remembers_is_split_over_all_devices(
  data, fsdp, shape, expected
):
  mesh = sharding.make_mesh(data, fsdp)
  tree = {'mu': jax.ShapeDtypeStruct(shape, jnp.float32)}
  found = sharding.tree_shardings(tree, mesh, everywhere=True)
  assert found['mu'].spec == expected


def test_a_share_of_a_mean_lies_within_that_of_its_parameter():
  mesh = sharding.make_mesh(2, 4)
  leaf = np.zeros((256, 512), np.float32)
  places = [
    sharding.tree_shardings({'w': leaf}, mesh, everywhere=everywhere)['w']
    for everywhere in (False, True)
  ]
  parameter, mean = (p.devices_indices_map(leaf.shape) for p in places)
  for device in mesh.devices.flat:
    whole, part = parameter[device][1], mean[device][1]
    assert whole.start <= part.start < part.stop <= whole.stop
    assert whole.stop - whole.start == 2 * (part.stop - part.start)


@pytest.mark.parametrize('shape', [(8, 1), (4, 2)])
def test_a_batch_goes_over_all_devices(shape):
  mesh = sharding.make_mesh(*shape)
  images = np.arange(16.0, dtype=np.float32).reshape(16, 1)
  placed = sharding.put_batch({'image': images}, mesh)['image']
  assert placed.sharding == sharding.batch_sharding(mesh)
  assert {s.data.shape for s in placed.addressable_shards} == {(2, 1)}
  np.testing.assert_array_equal(placed, images)
  everywhere = jax.device_put(images, sharding.replicated(mesh))
  assert {s.data.shape for s in everywhere.addressable_shards} == {(16, 1)}


@pytest.mark.parametrize('batch_size', [0, -8, 4, 12])
def test_batches_that_the_devices_cannot_share(batch_size):
  mesh = sharding.make_mesh()
  with pytest.raises(errors.ConfigError, match=f'batch_size={batch_size}'):
    sharding.check_batch_size(batch_size, mesh)
  sharding.check_batch_size(16, mesh)


@pytest.mark.parametrize('shape', [(8, 1), (2, 4)])
def test_devices_cut_their_own_share_of_a_batch(shape):
  mesh = sharding.make_mesh(*shape)
  images = np.arange(48.0, dtype=np.float32).reshape(48, 1)
  batch = sharding.put_batch({'image': images}, mesh)
  with jax.set_mesh(mesh):
    cut = jax.jit(lambda b: sharding.cut_batch(b, 3))
    parts = cut(batch)['image']
    text = cut.lower(batch).compile().as_text()
  assert not hlo.collectives(text)
  np.testing.assert_array_equal(parts, [images[i::3] for i in range(3)])
  assert {s.data.shape for s in parts.addressable_shards} == {(3, 2, 1)}


@pytest.mark.parametrize(('batch', 'parts'), [(16, 2), (48, 3), (8, 1)])
def test_micro_batches_that_devices_can_share(batch, parts):
  sharding.check_accumulation(batch, parts, sharding.make_mesh())


@pytest.mark.parametrize(
  ('batch', 'parts', 'message'),
  [
    (16, 0, 'train.accumulate=0; wanted 1 or more'),
    (24, 2, 'batch_size=24 .* train.accumulate=2 .* wanted a multiple of 16'),
    (16, 4, 'batch_size=16 .* train.accumulate=4 .* wanted a multiple of 32'),
  ],
)
def test_micro_batches_that_they_cannot(batch, parts, message):
  with pytest.raises(errors.ConfigError, match=message):
    sharding.check_accumulation(batch, parts, sharding.make_mesh())
