import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from selfboottok_jax import placement
from selfboottok_jax.training import sharding

# What a traced program says about a value's place.
SAID = 'sharding_constraint'


def _program(function, x, mesh=None):
  if mesh is None:
    return str(jax.make_jaxpr(function)(x))
  with jax.set_mesh(mesh):
    return str(jax.make_jaxpr(function)(x))


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(2, 4)


def test_nothing_is_said_without_a_mesh():
  x = jnp.zeros((8, 3))
  assert placement.mesh_in_use() is None
  for function in (placement.split_batch, placement.gather):
    assert SAID not in _program(function, x)
    assert function(x) is x


def test_nothing_is_said_on_other_meshes():
  auto = (jax.sharding.AxisType.Auto,)
  x = jnp.zeros((8, 3))
  for other in (
    sharding.make_mesh(devices=jax.devices()[:1]),
    jax.make_mesh((8,), ('data',), axis_types=auto),
    jax.make_mesh((8,), ('fsdp',), axis_types=auto),
    jax.make_mesh(
      (2, 4), sharding.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2
    ),
  ):
    assert SAID not in _program(placement.split_batch, x, other)
    assert SAID not in _program(placement.gather, x, other)


@pytest.mark.parametrize('batch', [1, 4, 12])
def test_a_batch_that_does_not_divide_is_left_alone(mesh, batch):
  program = _program(placement.split_batch, jnp.zeros((batch, 3)), mesh)
  assert SAID not in program


def test_a_batch_is_split_over_all_devices_and_so_is_its_gradient(mesh):
  def loss(x):
    return jnp.sum(placement.split_batch(x) ** 2)

  x = np.arange(48.0, dtype=np.float32).reshape(16, 3)
  with jax.set_mesh(mesh):
    split = jax.jit(placement.split_batch)(x)
    gradient = jax.jit(jax.grad(loss))(x)
  rows = sharding.batch_sharding(mesh)
  assert split.sharding.is_equivalent_to(rows, 2)
  np.testing.assert_array_equal(split, x)
  assert gradient.sharding.is_equivalent_to(rows, 2)
  np.testing.assert_array_equal(gradient, 2 * x)


def _scan(x):
  def body(x, _):
    return placement.split_batch(x) * 2, None

  return jax.lax.scan(body, x, None, length=3)[0]


@pytest.mark.parametrize(
  'function',
  [
    _scan,
    jax.checkpoint(placement.split_batch),
    lambda x: jax.vmap(placement.split_batch, in_axes=1, out_axes=1)(x),
    functools.partial(jax.lax.map, placement.split_batch),
  ],
  ids=['scan', 'remat', 'vmap', 'map'],
)
def test_places_are_said_inside_of(function, mesh):
  x = np.arange(24.0, dtype=np.float32).reshape(8, 3)
  if isinstance(function, functools.partial):
    x = np.stack([x, x])
  with jax.set_mesh(mesh):
    assert SAID in _program(function, x, mesh)
    shared = jax.jit(function)(x)
  np.testing.assert_array_equal(shared, jax.jit(function)(x))


def test_nothing_is_said_where_a_device_computes_alone(mesh):
  alone = jax.shard_map(
    placement.split_batch,
    mesh=mesh,
    in_specs=P(sharding.AXES),
    out_specs=P(sharding.AXES),
  )
  x = np.arange(192.0, dtype=np.float32).reshape(64, 3)
  assert SAID not in _program(alone, x, mesh)
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(alone)(x), x)


def test_weights_are_gathered_but_not_their_gradients(mesh):
  weight = np.ones((8, 3), np.float32)
  where = jax.NamedSharding(mesh, P('fsdp'))
  with jax.set_mesh(mesh):
    whole = jax.jit(placement.gather)(jax.device_put(weight, where))
  assert whole.sharding.is_fully_replicated


@pytest.mark.parametrize('size', [placement.MIN_SIZE, 8])
def test_a_device_gets_the_gradient_of_its_share_of_a_weight(mesh, size):
  weight = np.ones((8, size // 8), np.float32)
  wanted = placement.shape_rule('', weight.shape, 4)
  with jax.set_mesh(mesh):
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(placement.gather(w) ** 2)))
    found = gradient(jax.device_put(weight, jax.NamedSharding(mesh, wanted)))
  assert found.sharding.is_equivalent_to(jax.NamedSharding(mesh, wanted), 2)
  np.testing.assert_array_equal(found, 2 * weight)


def test_the_platform_is_that_of_the_mesh_or_assumed(mesh):
  assert placement.platform() == 'cpu'
  with jax.set_mesh(mesh):
    assert placement.platform() == 'cpu'
    with placement.assume_platform('tpu'):
      assert placement.platform() == 'tpu'
  described = jax.sharding.AbstractMesh(
    (2, 4),
    placement.AXES,
    abstract_device=jax.sharding.AbstractDevice('TPU v5', 1, 'tpu'),
  )
  with jax.sharding.use_abstract_mesh(described):
    assert placement.platform() == 'tpu'
  assert placement.platform() == 'cpu'


def test_a_kernel_sees_the_images_of_its_device(mesh):
  seen = []

  def kernel(x, y):
    seen.append((x.shape, y.shape))
    return x + y.sum(-1, keepdims=True)

  rng = np.random.default_rng(0)
  x, y = rng.normal(size=(16, 3)), rng.normal(size=(16, 2))
  with jax.set_mesh(mesh):
    assert placement.maps_images(16)
    assert not placement.maps_images(12)
    out = jax.jit(functools.partial(placement.map_images, kernel))(x, y)
  assert seen == [((2, 3), (2, 2))]
  assert out.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
  np.testing.assert_allclose(out, x + y.sum(-1, keepdims=True), rtol=1e-5)


def test_a_kernel_is_not_split_without_a_mesh():
  x = jnp.ones((3, 2))
  out = placement.map_images(lambda x: x * 2, x)
  np.testing.assert_array_equal(out, 2 * x)
  # There are eight devices, and what is placed on them is not known.
  assert not placement.maps_images(8)


def test_a_kernel_is_not_split_where_a_device_computes_alone(mesh):
  def alone(x):
    assert placement.maps_images(len(x))
    return placement.map_images(lambda x: 2 * x, x)

  x = jnp.ones((8, 2))
  places = {'in_specs': P(sharding.AXES), 'out_specs': P(sharding.AXES)}
  out = jax.jit(jax.shard_map(alone, mesh=mesh, **places))(x)
  np.testing.assert_array_equal(out, 2 * x)


@pytest.mark.parametrize(
  ('shape', 'expected'), [((8, 1), False), ((2, 4), True)]
)
def test_tells_whether_weights_are_shared(shape, expected):
  assert not placement.shares_weights()
  with jax.set_mesh(sharding.make_mesh(*shape)):
    seen = []
    jax.jit(lambda x: seen.append(placement.shares_weights()) or x).trace(1.0)
  assert seen == [expected]
