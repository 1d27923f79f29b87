"""Device meshes of axes (data, fsdp), and the placement of arrays on them.

Batches are split over all devices. What computes, trained and frozen
parameters, is split over the fsdp axis and repeated over the data axis; what
only remembers, moments and running means, is split over both. One rule of their
shapes says along which axis.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from selfboottok_jax import errors, placement

AXES = placement.AXES
# Devices that share the parameters if nobody says how many: those of a machine
# with GPUs, or of a small TPU slice. Between them, a block's weights arrive in
# less time than its arithmetic takes.
MOST_SHARING = 8


def make_mesh(
  data: int = -1,
  fsdp: int = -1,
  devices: Iterable[jax.Device] | None = None,
) -> Mesh:
  """Makes a mesh of data x fsdp devices.

  Args:
    data: size of the data axis; -1 for as many as `fsdp` leaves.
    fsdp: size of the axis over which parameters are split; 1 gathers no weight
      while computing. -1 is for as many as `data` leaves or, without that
      either, for the largest number up to MOST_SHARING that divides all.
    devices: devices to use, in order; all by default.

  Raises:
    ConfigError: the product is not the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  if data == fsdp == -1:
    fsdp = max(n for n in range(1, MOST_SHARING + 1) if count % n == 0)
  if data == -1:
    data = count // max(fsdp, 1)
  elif fsdp == -1:
    fsdp = count // max(data, 1)
  if data < 1 or fsdp < 1 or data * fsdp != count:
    raise errors.ConfigError(
      f'mesh.data={data} x mesh.fsdp={fsdp} is not the {count} devices '
      'of this run; set mesh.data=-1, or a product that equals it'
    )
  # Neighbouring devices share an fsdp group, whose traffic is the heaviest.
  grid = np.asarray(devices).reshape(data, fsdp)
  # Auto: the compiler derives the sharding of all that is in between.
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def tree_specs(
  tree: PyTree, sizes: Mapping[str, int], *, everywhere: bool = False
) -> PyTree:
  """Returns how every leaf of a tree of arrays, or their shapes, is split.

  Args:
    tree: arrays by path.
    sizes: sizes of the mesh's axes.
    everywhere: split over all devices where the shape allows it, else over the
      fsdp axis alone.
  """

  def spec(path: tuple[Any, ...], leaf: Any) -> P:
    name, fsdp = jax.tree_util.keystr(path), sizes['fsdp']
    if everywhere and sizes['data'] > 1:
      # In this order a device's share lies within its share of the parameter.
      axes = ('fsdp', 'data')
      split = placement.shape_rule(name, leaf.shape, fsdp * sizes['data'], axes)
      if split != P():
        return split
    return placement.shape_rule(name, leaf.shape, fsdp)

  return jax.tree_util.tree_map_with_path(spec, tree)


def tree_shardings(
  tree: PyTree, mesh: Mesh, *, everywhere: bool = False
) -> PyTree:
  """Returns the sharding of every leaf; arguments are those of `tree_specs`."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec),
    tree_specs(tree, mesh.shape, everywhere=everywhere),
  )


def split(tree: PyTree) -> PyTree:
  """Splits arrays over all devices of the mesh in use, while computing.

  Gradients that are split at once are added up share by share.
  """
  mesh = placement.mesh_in_use()
  if mesh is None:
    return tree
  return jax.tree.map(
    jax.lax.with_sharding_constraint,
    tree,
    tree_specs(tree, mesh.shape, everywhere=True),
  )


def gather_unstacked(tree: PyTree) -> PyTree:
  """Gathers the parameters that belong to no scanned stack, while computing.

  Stacks gather their own, block by block. What is left is small.
  """
  if not placement.shares_weights():
    return tree
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf
      if placement.STACKED in jax.tree_util.keystr(path)
      else placement.gather(leaf)
    ),
    tree,
  )


def place_abstractly(
  tree: PyTree, mesh: Mesh, *, everywhere: bool = False
) -> PyTree:
  """Returns the shape, type and sharding of every leaf, without its values.

  Arguments are those of `tree_specs`.
  """
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    tree,
    tree_shardings(tree, mesh, everywhere=everywhere),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits the first axis over all devices."""
  return NamedSharding(mesh, P(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that repeats an array on every device."""
  return NamedSharding(mesh, P())


def cut_batch(batch: PyTree, parts: int) -> PyTree:
  """Cuts a batch into micro-batches, on a new first axis, while computing.

  Micro-batch i has the images i, i + parts, ...: every device cuts its own
  share of the batch, and no image moves.
  """

  def cut(x: jax.Array) -> jax.Array:
    rows = x.reshape(-1, parts, *x.shape[1:])
    return placement.split_batch(jnp.swapaxes(rows, 0, 1), axis=1)

  return jax.tree.map(cut, batch)


def check_accumulation(batch_size: int, parts: int, mesh: Mesh) -> None:
  """Checks that the devices can share each of `parts` micro-batches evenly.

  Raises:
    ConfigError: they cannot, or `parts` is less than 1.
  """
  errors.require(parts >= 1, 'train.accumulate', parts, '1 or more')
  if batch_size % (parts * mesh.size):
    raise errors.ConfigError(
      f'data.batch_size={batch_size} does not divide into train.accumulate='
      f'{parts} micro-batches over {mesh.size} devices; wanted a multiple of '
      f'{parts * mesh.size}'
    )


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
