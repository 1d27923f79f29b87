"""Device meshes of axes (data, fsdp), and the placement of arrays on them.

Batches are split over all devices. Parameters and optimiser states are split
over the fsdp axis and repeated over the data axis, by one rule of their shapes.
"""

import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from selfboottok_jax import errors

AXES = ('data', 'fsdp')
# Parameters with this name in their path belong to a scanned stack: their first
# axis counts the blocks.
STACKED = 'blocks'
# Arrays of fewer elements are repeated on all devices: gathering them would
# cost more than the memory it saves.
MIN_SIZE = 2**14


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  devices: Iterable[jax.Device] | None = None,
) -> Mesh:
  """Makes a mesh of data x fsdp devices.

  Args:
    data: size of the data axis; -1 for as many as `fsdp` leaves.
    fsdp: size of the axis over which the state is split.
    devices: devices to use, in order; all by default.

  Raises:
    ConfigError: the product is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  if data == -1:
    data = len(devices) // max(fsdp, 1)
  if data < 1 or fsdp < 1 or data * fsdp != len(devices):
    raise errors.ConfigError(
      f'mesh.data={data} x mesh.fsdp={fsdp} is not the {len(devices)} devices '
      'of this run; set mesh.data=-1, or a product that equals it'
    )
  # Neighbouring devices share an fsdp group, whose traffic is the heaviest.
  grid = np.asarray(devices).reshape(data, fsdp)
  # Auto: the compiler derives the sharding of all that is in between.
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shape_rule(path: str, shape: tuple[int, ...], fsdp: int) -> P:
  """Chooses the axis of a parameter to split over the fsdp axis of a mesh.

  It is the longest axis that divides by `fsdp`, the first of several. Small
  arrays, and those without such an axis, are not split.

  Args:
    path: the parameter's path in its tree.
    shape: its shape.
    fsdp: size of the fsdp axis.
  """
  if fsdp == 1 or math.prod(shape) < MIN_SIZE:
    return P()
  # A scan slices the axis of blocks: split there, each iteration would have to
  # fetch its block from another device.
  first = 1 if STACKED in path else 0
  # Negative, so that max prefers the earlier of two axes of the same size.
  axes = [
    (size, -axis)
    for axis, size in enumerate(shape)
    if axis >= first and size % fsdp == 0
  ]
  if not axes:
    return P()
  axis = -max(axes)[1]
  return P(*(None,) * axis, 'fsdp')


def tree_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
  """Returns the sharding of every leaf of a tree of arrays or their shapes."""
  fsdp = mesh.shape['fsdp']
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, shape_rule(jax.tree_util.keystr(path), leaf.shape, fsdp)
    ),
    tree,
  )


def place_abstractly(tree: PyTree, mesh: Mesh) -> PyTree:
  """Returns the shape, type and sharding of every leaf, without its values."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    tree,
    tree_shardings(tree, mesh),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis over all devices."""
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that repeats an array on every device."""
  return NamedSharding(mesh, P())


def check_batch_size(
  batch_size: int, mesh: Mesh, name: str = 'data.batch_size'
) -> None:
  """Checks that the devices can share a global batch evenly.

  Args:
    batch_size: images of all processes together.
    mesh: the devices.
    name: the configuration's key, for the error.

  Raises:
    ConfigError: the batch size is not a positive multiple of the devices.
  """
  if batch_size < 1 or batch_size % mesh.size:
    raise errors.ConfigError(
      f'{name}={batch_size} does not divide over {mesh.size} '
      'devices; wanted a positive multiple of it'
    )


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
  """Assembles global arrays on the mesh from each process's share.

  Args:
    batch: host arrays, this process's part of the first axis.
    mesh: the devices of all processes.
  """
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
