"""Meshes of (data, fsdp), and one shape rule that places the whole state."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from selfboottok_jax import errors

AXES = ('data', 'fsdp')
# A name in a parameter's path whose first axis is the layer axis of a scan.
STACKED = 'blocks'
# Below this many numbers a gather costs more than the memory it saves.
MIN_SIZE = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, devices=None) -> Mesh:
  """A mesh of data x fsdp devices; -1 for `data` takes all that are left."""
  devices = jax.devices() if devices is None else list(devices)
  if data == -1:
    data = len(devices) // max(fsdp, 1)
  if data < 1 or fsdp < 1 or data * fsdp != len(devices):
    raise errors.ConfigError(
      f'mesh.data={data} x mesh.fsdp={fsdp} is not the {len(devices)} devices '
      'of this run; set mesh.data=-1, or a product that equals it'
    )
  grid = np.asarray(devices).reshape(data, fsdp)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def shape_rule(path: str, shape: tuple[int, ...], fsdp: int) -> P:
  """Shards the longest axis that divides; the layer axis of a scan never."""
  if fsdp == 1 or math.prod(shape) < MIN_SIZE:
    return P()
  first = 1 if STACKED in path else 0
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
  """A NamedSharding for every leaf of a tree of arrays or their shapes."""
  fsdp = mesh.shape['fsdp']
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: NamedSharding(
      mesh, shape_rule(jax.tree_util.keystr(path), leaf.shape, fsdp)
    ),
    tree,
  )


def place_abstractly(tree: PyTree, mesh: Mesh) -> PyTree:
  """The shapes and types of a tree, with the shardings of the shape rule."""
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    tree,
    tree_shardings(tree, mesh),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The first axis over all devices."""
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


def check_batch_size(
  batch_size: int, mesh: Mesh, name: str = 'data.batch_size'
) -> None:
  """Raises ConfigError for a global batch that the devices cannot share."""
  if batch_size < 1 or batch_size % mesh.size:
    raise errors.ConfigError(
      f'{name}={batch_size} does not divide over {mesh.size} '
      'devices; wanted a positive multiple of it'
    )


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
  """Host arrays of this process's share to arrays over the whole mesh."""
  sharding = batch_sharding(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )
