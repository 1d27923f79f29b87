"""Precision and recall of a set of images by nearest neighbours.

Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing
Generative Models", 2019. The manifold of a set is the union of balls around its
features, each as large as the distance to the feature's k-th neighbour.
Precision is the share of generated images in the manifold of real ones, recall
the share of real images in that of generated ones.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from selfboottok_jax import errors

NEIGHBOURS = 3
# Features whose distances are computed at a time: a device holds all columns,
# and so many distances.
ROWS, COLUMNS = 1024, 4096
# Candidates beyond those wanted: float32 may confuse neighbours at almost the
# same distance.
_SPARE = 5


def precision_recall(
  real: Float[np.ndarray, 'n d'],
  made: Float[np.ndarray, 'm d'],
  neighbours: int = NEIGHBOURS,
) -> tuple[float, float]:
  """Computes (precision, recall) as ADM's evaluator does, without its float16.

  Args:
    real: features of real images, float32.
    made: features of the images that are judged, of the same network.
    neighbours: k; a feature is not its own neighbour.

  Raises:
    DataError: a set of `neighbours` images or fewer.
  """
  for features in (real, made):
    if len(features) <= neighbours:
      raise errors.DataError(
        f'precision and recall of {len(features)} images with {neighbours} '
        f'neighbours; give {neighbours + 1} images or more'
      )
  # Distances stay, and lose less to rounding near 0.
  centre = real.mean(axis=0, dtype=np.float64).astype(np.float32)[None]
  real, made = real - centre, made - centre
  inside = contains(real, radii(real, neighbours), made)
  covered = contains(made, radii(made, neighbours), real)
  return float(inside.mean()), float(covered.mean())


def radii(
  features: Float[np.ndarray, 'n d'], neighbours: int = NEIGHBOURS
) -> Float[np.ndarray, 'n']:
  """Squared distance of each feature to its k-th neighbour, in float64.

  The feature itself counts as the one at index 0, also where others equal it.
  """
  zeros = np.zeros(len(features))
  found = [
    np.partition(square, neighbours, axis=1)[:, neighbours]
    for _, square in _closest(features, features, zeros, 1 + neighbours)
  ]
  return np.concatenate(found)


def contains(
  centres: Float[np.ndarray, 'n d'],
  squared_radii: Float[np.ndarray, 'n'],
  points: Float[np.ndarray, 'm d'],
) -> Bool[np.ndarray, 'm']:
  """True for points in a ball, those on its edge included."""
  found = [
    (square <= squared_radii[index]).any(axis=1)
    for index, square in _closest(points, centres, squared_radii, 1)
  ]
  return np.concatenate(found)


def _closest(
  rows: Float[np.ndarray, 'm d'],
  columns: Float[np.ndarray, 'n d'],
  offsets: Float[np.ndarray, 'n'],
  wanted: int,
) -> Iterator[tuple[Int[np.ndarray, 'r c'], Float[np.ndarray, 'r c']]]:
  """Yields (index, squared distance) of the nearest columns, block by block.

  Nearest are the columns with the largest offset - |row - column|^2. A device
  finds `wanted` and a few more of them in float32; their distances are computed
  again here, in float64 from differences: equal features are at distance 0, and
  ties are ties.
  """
  count, width = len(columns), columns.shape[1]
  size = min(COLUMNS, count)
  padding = -count % size
  columns_padded = np.pad(columns, ((0, padding), (0, 0)))
  offsets_padded = np.pad(offsets, (0, padding), constant_values=-np.inf)
  mesh = jax.make_mesh(
    (jax.local_device_count(),), ('rows',), devices=jax.local_devices()
  )
  share, everywhere = (NamedSharding(mesh, P(*a)) for a in (('rows',), ()))
  blocks = jax.device_put(
    (
      columns_padded.reshape(-1, size, width),
      offsets_padded.reshape(-1, size).astype(np.float32),
    ),
    everywhere,
  )
  search = jax.jit(
    jax.shard_map(
      functools.partial(_search, most=min(wanted + _SPARE, count)),
      mesh=mesh,
      in_specs=(P('rows'), P()),
      out_specs=P('rows'),
      check_vma=False,
    )
  )
  step = -(-min(ROWS, len(rows)) // mesh.size) * mesh.size
  for first in range(0, len(rows), step):
    block = rows[first : first + step]
    padded = np.pad(block, ((0, step - len(block)), (0, 0)))
    found = search(jax.device_put(padded, share), blocks)
    index = np.asarray(found)[: len(block)]
    square = np.empty(index.shape)
    # One column of candidates at a time: little memory, and a sum whose order
    # hangs on the number of features alone.
    for i in range(index.shape[1]):
      shift = block.astype(np.float64) - columns[index[:, i]]
      square[:, i] = np.square(shift).sum(axis=1)
    yield index, square


def _search(
  rows: Float[Array, 'r d'],
  blocks: tuple[Float[Array, 'k c d'], Float[Array, 'k c']],
  most: int,
) -> Int[Array, 'r most']:
  """Indices of the columns with the largest offset - |row - column|^2."""
  size = blocks[1].shape[1]

  def visit(
    best: tuple[Array, Array], block: tuple[Array, Array, Array]
  ) -> tuple[tuple[Array, Array], None]:
    columns, offsets, first = block
    product = jnp.einsum(
      'rd,cd->rc', rows, columns, precision=jax.lax.Precision.HIGHEST
    )
    squares = (jnp.square(x).sum(axis=1) for x in (rows, columns))
    left, right = squares
    square = left[:, None] + right[None] - 2 * product
    depth = offsets[None] - jnp.maximum(square, 0)
    index = jnp.broadcast_to(first + jnp.arange(size)[None], depth.shape)
    depth, index = (
      jnp.concatenate(pair, axis=1)
      for pair in zip(best, (depth, index), strict=True)
    )
    depth, place = jax.lax.top_k(depth, most)
    return (depth, jnp.take_along_axis(index, place, axis=1)), None

  start = (
    jnp.full((len(rows), most), -jnp.inf),
    jnp.zeros((len(rows), most), jnp.int32),
  )
  firsts = size * jnp.arange(len(blocks[0]))
  (_, index), _ = jax.lax.scan(visit, start, (*blocks, firsts))
  return index
