"""Placement of values on the mesh of (data, fsdp) while a program computes.

Images of a batch are split over all devices, and so is every activation.
Weights that devices share are gathered where they are used, one layer at a
time. Left to itself, the compiler splits the products of a shared weight
instead, and hands all images to all devices for it.

Nothing here changes a value, and all of it does nothing where no such mesh is
in use (`jax.set_mesh`): in inference, in tests, and on a single device.
"""

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp')


def mesh_in_use() -> AbstractMesh | None:
  """The mesh of the program that is being traced; None where there is none.

  None too for a mesh of one device, of other axes, or with axes that are not
  left to the compiler, as inside of `jax.shard_map`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.axis_names != AXES or mesh.size == 1:
    return None
  return mesh if set(mesh.axis_types) == {AxisType.Auto} else None


def shares_weights() -> bool:
  """True where the devices of the mesh in use share each large weight."""
  mesh = mesh_in_use()
  return mesh is not None and mesh.shape['fsdp'] > 1


def split_batch(x: jax.Array, axis: int = 0) -> jax.Array:
  """Splits the axis of images of `x` over all devices, and no other axis.

  The gradient is split in the same way. An `x` with a number of images that
  does not divide by the devices, perhaps 1, is left to the compiler.
  """
  mesh = mesh_in_use()
  if mesh is None or x.shape[axis] % mesh.size:
    return x
  return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, AXES))


@jax.custom_vjp
def gather(weight: jax.Array) -> jax.Array:
  """Repeats all of a weight on every device.

  Its gradient is not gathered: where each device keeps a share of it, the
  compiler adds it up share by share (a reduce-scatter).
  """
  return _repeat(weight)


def _repeat(x: jax.Array) -> jax.Array:
  if mesh_in_use() is None:
    return x
  return jax.lax.with_sharding_constraint(x, P())


# Not `gather` again: its call would hide the constraint from those who look for
# it in a trace, as `transformer.Stack` does.
gather.defvjp(lambda x: (_repeat(x), None), lambda _, gradient: (gradient,))
