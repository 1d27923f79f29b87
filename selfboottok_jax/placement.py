"""Placement of values on the mesh of (data, fsdp) while a program computes.

Images of a batch are split over all devices, and so is every activation.
Weights that devices share are gathered where they are used, one layer at a
time. Left to itself, the compiler splits the products of a shared weight
instead, and hands all images to all devices for it.

Nothing here changes a value, and all of it does nothing where no such mesh is
in use (`jax.set_mesh`): in inference, in tests, and on a single device.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator

import jax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp')
# Parameters with this name in their path belong to a scanned stack: their first
# axis counts the blocks.
STACKED = 'blocks'
# Arrays of fewer elements, those of one block in a stack, are repeated on all
# devices: gathering them would cost more than the memory it saves.
MIN_SIZE = 2**14
_assumed: contextvars.ContextVar[str] = contextvars.ContextVar(
  'platform', default=''
)


def platform() -> str:
  """The platform that the traced program is for: 'cpu', 'gpu' or 'tpu'.

  That of the mesh in use, which need not be one of this machine: programs are
  compiled for hardware that is not there.
  """
  if _assumed.get():
    return _assumed.get()
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  return jax.default_backend() if device is None else device.platform


@contextlib.contextmanager
def assume_platform(name: str) -> Iterator[None]:
  """Traces for a platform whose devices others stand for."""
  token = _assumed.set(name)
  try:
    yield
  finally:
    _assumed.reset(token)


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


def maps_images(count: int) -> bool:
  """True if `map_images` can hand each device whole images of so many."""
  mesh = mesh_in_use()
  if mesh is not None:
    return count % mesh.size == 0
  # Inside of `jax.shard_map` a device has its images already. What else is on
  # several devices, the compiler has to split.
  types = jax.sharding.get_abstract_mesh().axis_types
  return set(types) == {AxisType.Manual} or jax.device_count() == 1


def map_images(
  function: Callable[..., jax.Array], *images: jax.Array
) -> jax.Array:
  """Calls a function on each device with the images that the device has.

  For kernels, which the compiler cannot split.

  Args:
    function: of a device's share of all arguments, and for it.
    *images: arrays of which the first axis is that of images, see
      `maps_images`.
  """
  if mesh_in_use() is None:
    return function(*images)
  return jax.shard_map(
    function,
    in_specs=P(AXES),
    out_specs=P(AXES),
    # Kernels do not say along which axes their results differ.
    check_vma=False,
  )(*images)


def shape_rule(
  path: str, shape: tuple[int, ...], parts: int, name: str | tuple = 'fsdp'
) -> P:
  """Chooses the axis of an array to split over devices.

  It is the longest axis that divides by `parts`, the first of several. Small
  arrays, and those without such an axis, are not split.

  Args:
    path: the array's path in its tree.
    shape: its shape.
    parts: number of devices that share it.
    name: the axis of the mesh, or the axes, with that many devices.
  """
  # A scan slices the axis of blocks: split there, each iteration would have to
  # fetch its block from another device.
  first = 1 if STACKED in path else 0
  if parts == 1 or math.prod(shape[first:]) < MIN_SIZE:
    return P()
  # Negative, so that max prefers the earlier of two axes of the same size.
  axes = [
    (size, -axis)
    for axis, size in enumerate(shape)
    if axis >= first and size % parts == 0
  ]
  if not axes:
    return P()
  axis = -max(axes)[1]
  return P(*(None,) * axis, name)


@jax.custom_vjp
def gather(weight: jax.Array) -> jax.Array:
  """Repeats all of a weight on every device.

  Its gradient is added up share by share (a reduce-scatter): each device gets
  that of its share of the weight.
  """
  return _repeat(weight)


def _repeat(x: jax.Array) -> jax.Array:
  if mesh_in_use() is None:
    return x
  # Said first that it is split: else the compiler may gather what `x` was cast
  # from, which is larger, or keep all of `x` from one pass to the other.
  return jax.lax.with_sharding_constraint(_share(x), P())


def _share(x: jax.Array) -> jax.Array:
  """Splits a weight, or its gradient, over the devices that share it."""
  mesh = mesh_in_use()
  if mesh is None:
    return x
  spec = shape_rule('', x.shape, mesh.shape['fsdp'])
  return jax.lax.with_sharding_constraint(x, spec)


# The gradient is placed too: left to itself, a compiler may add up all of it on
# every device first, twice the bytes, and then drop what it does not keep.
# Not `gather` again: its call would hide the constraint from those who look for
# it in a trace, as `transformer.Stack` does.
gather.defvjp(lambda x: (_repeat(x), None), lambda _, x: (_share(x),))
