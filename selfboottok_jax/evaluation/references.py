"""References: the sets of images that others are compared with.

A reference is a source of photographs or an .npz file: ADM's (mu, sigma, mu_s,
sigma_s of Inception, and images in arr_0), pytorch-fid's (mu, sigma), or one
with images alone. Features of images are computed once and kept in a folder, by
all that they depend on. Everything there can be deleted.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Float

from selfboottok_jax import data, errors, files, sizes
from selfboottok_jax.evaluation import frechet, npz_files, set_features
from selfboottok_jax.pretrained import store
from selfboottok_jax.training import processes

# ADM compares samples with so many images by nearest neighbours.
MOST_NEIGHBOURS = 10_000
# Fewer make no reference: nearest neighbours need that many too.
LEAST_IMAGES = 4
# Version of the cached features.
_FORMAT = 1
# Arrays of statistics in .npz files, by the kind of features of Inception.
_STATISTICS = {
  set_features.POOL: ('mu', 'sigma'),
  set_features.SPATIAL: ('mu_s', 'sigma_s'),
}


@dataclasses.dataclass(frozen=True)
class Reference:
  """The part of a reference set that scores need.

  Attributes:
    name: the path, or a description of the images.
    fingerprint: a digest of its content.
    count: number of images; 0 where a file of statistics does not say.
    gaussians: fits of its features, by `SetNetwork.key`.
    features: features to look for neighbours in, likewise.
    crop: how the images were cut, '' where that is not known.
    warnings: what a reader of Inception's scores should know.
  """

  name: str
  fingerprint: str
  count: int
  gaussians: Mapping[str, frechet.Gaussian]
  features: Mapping[str, Float[np.ndarray, 'n d']]
  crop: str = ''
  warnings: tuple[str, ...] = ()

  def gaussian(self, key: str) -> frechet.Gaussian:
    """The fit of features; UserError if it has none of these."""
    if key not in self.gaussians:
      raise errors.UserError(
        f'the reference {self.name} was opened without features {key}; open it '
        'for the same networks and metrics'
      )
    return self.gaussians[key]

  @property
  def protocol(self) -> dict[str, Any]:
    """Part of a score's protocol."""
    found: dict[str, Any] = {
      'reference': self.name,
      'reference_fingerprint': self.fingerprint[:12],
    }
    if self.count:
      found['reference_count'] = self.count
    return found | ({'crop': self.crop} if self.crop else {})


def open_reference(
  spec: str | os.PathLike[str],
  wanted: set_features.Wanted,
  *,
  image_size: sizes.Size,
  batch_size: int = 64,
  num_images: int = 0,
  split: str = 'val',
  source: str = 'auto',
  cache: str | os.PathLike[str] | None = None,
) -> Reference:
  """Opens a reference, and computes the features that it needs.

  All processes must call this together.

  Args:
    spec: an .npz file, or photographs as `data.open_all` takes them.
    wanted: features that the scores need, `SetMeasurement.wanted`.
    image_size: that of the images to be compared with it.
    batch_size: images at a time, of all processes together.
    num_images: at most so many photographs, spread evenly; 0 for all.
    split: of photographs that have splits.
    source: kind of photographs, see `data.open_source`.
    cache: folder of computed features, `store.cache_folder()` by default.

  Raises:
    UserError: a file or photographs that are no reference for these features.
  """
  path = os.fspath(spec)
  if path.lower().endswith('.npz'):
    return of_npz(
      path, wanted, image_size=image_size, batch_size=batch_size, cache=cache
    )
  batches = data.make_eval_dataset(
    data.open_all(path, split=split, flag='reference')
    if source == 'auto'
    else data.open_source(source, path, split, image_size),
    batch_size=batch_size,
    image_size=image_size,
    num_images=num_images or None,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  return of_batches(batches, wanted, image_size=image_size, cache=cache)


def of_batches(
  batches: data.EvalBatches,
  wanted: set_features.Wanted,
  *,
  image_size: sizes.Size,
  cache: str | os.PathLike[str] | None = None,
) -> Reference:
  """Makes a reference of centre crops of photographs; see `open_reference`."""
  source = batches.source
  identity = {
    'data': source.fingerprint,
    'crop': 'centre',
    'image_size': list(sizes.pair(image_size)),
    'count': batches.count,
  }
  if batches.count < len(source):
    rows = np.sort(batches.order[batches.order >= 0]).astype('<i8')
    identity['rows'] = hashlib.sha256(rows.tobytes()).hexdigest()
  gaussians, features = _compute(
    repr(source), batches, batches.count, identity, wanted, cache
  )
  return Reference(
    repr(source),
    source.fingerprint,
    batches.count,
    gaussians,
    features,
    crop='centre',
  )


def of_npz(
  path: str | os.PathLike[str],
  wanted: set_features.Wanted,
  *,
  image_size: sizes.Size | None,
  batch_size: int = 64,
  cache: str | os.PathLike[str] | None = None,
) -> Reference:
  """Makes a reference of a file of statistics, of images, or of both.

  Statistics serve the official Inception alone; the features of other networks,
  and those for nearest neighbours, are those of the images.
  """
  file = npz_files.NpzFile(path)
  # Statistics beside images of another size are of another size too.
  if image_size is not None and npz_files.IMAGES in file.shapes:
    _check_size(file, image_size)
  fingerprint = store.sha256(file.path)
  given = {
    key: _read_statistics(file, key, wanted)
    for key in wanted.moments
    if wanted.network_of(key).is_official
    and _STATISTICS[key.partition('/')[2]][0] in file.shapes
  }
  missing = dataclasses.replace(
    wanted,
    moments=tuple(key for key in wanted.moments if key not in given),
    kept=_neighbour_keys(wanted),
  )
  computed: dict[str, frechet.Gaussian] = {}
  features: dict[str, np.ndarray] = {}
  count = 0
  if missing.moments or missing.kept:
    _check_images(file, missing)
    count = file.shapes[npz_files.IMAGES][0]
    batches = file.batches(
      batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    computed, features = _compute(
      str(path), batches, count, {'npz': fingerprint}, missing, cache
    )
  warnings: tuple[str, ...] = ()
  if given and 'mu_s' not in file.shapes:
    warnings = (
      'statistics without mu_s may be of pytorch-fid, whose resize is another',
    )
  return Reference(
    str(path),
    fingerprint,
    # Statistics are of other images than those that may lie beside them.
    0 if given else count,
    computed | given,
    features,
    warnings=warnings,
  )


def _neighbour_keys(wanted: set_features.Wanted) -> tuple[str, ...]:
  """Features that a reference keeps one by one: logits are none of them."""
  pool = f'/{set_features.POOL}'
  return tuple(key for key in wanted.kept if key.endswith(pool))


def _read_statistics(
  file: npz_files.NpzFile, key: str, wanted: set_features.Wanted
) -> frechet.Gaussian:
  """The mean and the covariance of a file, if they can be those of `key`."""
  mean_name, covariance_name = _STATISTICS[key.partition('/')[2]]
  width = wanted.width(key)
  shape = file.shapes[mean_name]
  if shape != (width,):
    raise errors.DataError(
      f'{file.path}: {mean_name} has the shape {shape}, wanted ({width},) for '
      f'{key}; give statistics of the same network'
    )
  mean = file.read(mean_name)
  covariance = file.read(covariance_name, (width, width))
  for name, array in ((mean_name, mean), (covariance_name, covariance)):
    if array.dtype.kind != 'f' or not np.isfinite(array).all():
      raise errors.DataError(
        f'{file.path}: {name} ({array.dtype}) has numbers that are not finite '
        'floats; compute the statistics again'
      )
  covariance = covariance.astype(np.float64)
  # Files may hold float32, and sums that were not exactly symmetric.
  slack = 1e-5 * np.abs(covariance).max()
  skewed = np.abs(covariance - covariance.T).max() > slack
  # Weyl: no eigenvalue moves by more than the norm of the rounding.
  lowest = np.linalg.eigvalsh(covariance)[0]
  if skewed or lowest < -1e-5 * np.linalg.norm(covariance):
    raise errors.DataError(
      f'{file.path}: {covariance_name} is no covariance: it is not symmetric, '
      'or has a negative variance; compute the statistics again'
    )
  return frechet.Gaussian(mean.astype(np.float64), covariance, 0)


def _check_images(
  file: npz_files.NpzFile,
  missing: set_features.Wanted,
) -> None:
  """Raises DataError unless the file has images for the missing features."""
  keys = ', '.join(dict.fromkeys((*missing.moments, *missing.kept)))
  if npz_files.IMAGES not in file.shapes:
    raise errors.DataError(
      f'{file.path} has no images ({npz_files.IMAGES}) to compute {keys} of, '
      f'only {", ".join(file.shapes) or "nothing"}; give a file with images, '
      'photographs, or other metrics (statistics are of Inception alone)'
    )


def _check_size(file: npz_files.NpzFile, image_size: sizes.Size) -> None:
  """Raises DataError for images of another size than those to compare."""
  found = file.image_size()
  if found != sizes.pair(image_size):
    height, width = sizes.pair(image_size)
    raise errors.DataError(
      f'{file.path} has images of {found[0]}x{found[1]}, those to compare with '
      f'it are {height}x{width}; give a reference of the same size'
    )


def _compute(
  name: str,
  batches: Iterable[Mapping[str, Any]],
  count: int,
  identity: Mapping[str, Any],
  wanted: set_features.Wanted,
  cache: str | os.PathLike[str] | None,
) -> tuple[dict[str, frechet.Gaussian], dict[str, np.ndarray]]:
  """Features of images, from the cache where they are there."""
  if count < LEAST_IMAGES:
    raise errors.DataError(
      f'the reference {name} has {count} images; wanted {LEAST_IMAGES} or '
      'more, and thousands for a score that means something'
    )
  folder = files.as_path(cache) if cache else store.cache_folder()
  arrays: dict[str, np.ndarray] = {}
  missing = {}
  for network in wanted.networks:
    path = folder / 'references' / _entry(network, identity)
    stored = _read_entry(path)
    # One process may lack what another has: features take all of them.
    if processes.anywhere(stored is None):
      missing[network] = path
    else:
      arrays |= stored or {}
  if missing:
    computed = _collect(name, batches, count, tuple(missing), wanted.mesh)
    arrays |= computed
    for network, path in missing.items():
      if jax.process_index() == 0:
        prefix = network.key('')
        own = {k: a for k, a in computed.items() if k.startswith(prefix)}
        _write_entry(path, own)
  return (
    {
      key: frechet.Gaussian(
        arrays[f'{key}/mean'], arrays[f'{key}/covariance'], count
      )
      for key in wanted.moments
    },
    {key: arrays[f'{key}/rows'] for key in _neighbour_keys(wanted)},
  )


def _collect(
  name: str,
  batches: Iterable[Mapping[str, Any]],
  count: int,
  networks: tuple[set_features.SetNetwork, ...],
  mesh: Mesh,
) -> dict[str, np.ndarray]:
  """Computes all that a reference of `count` images may be asked for.

  Unwanted kinds of features cost nothing beside the network, and other metrics
  find them in the cache.
  """
  collected = set_features.SetFeatures(
    set_features.Wanted(
      networks,
      moments=tuple(
        network.key(kind)
        for network in networks
        for kind in network.widths()
        if kind != set_features.LOGITS
      ),
      kept=tuple(network.key(set_features.POOL) for network in networks),
      mesh=mesh,
    ),
    most_kept=MOST_NEIGHBOURS,
    of=count,
  )
  for batch in batches:
    collected.add(batch)
  collected.finish()
  if collected.count != count:
    raise errors.DataError(
      f'{name}: {collected.count} images were read of {count}; look at the '
      'damaged ones'
    )
  arrays: dict[str, np.ndarray] = {}
  for key in collected.wanted.moments:
    fit = collected.gaussian(key)
    arrays |= {f'{key}/mean': fit.mean, f'{key}/covariance': fit.covariance}
  for key in collected.wanted.kept:
    arrays[f'{key}/rows'] = collected.features(key)
  return arrays


def _entry(
  network: set_features.SetNetwork, identity: Mapping[str, Any]
) -> str:
  """Name of the file that caches a network's features of a set."""
  content = {'format': _FORMAT, 'images': identity, **network.identity}
  text = json.dumps(content, sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:16]
  return f'{network.name}-{digest}.npz'


def _write_entry(path: files.Path, arrays: Mapping[str, Any]) -> None:
  """Caches features; a folder that cannot be written is a warning."""
  try:
    with files.writing(path) as file:
      np.savez(file, **arrays)
  except OSError as error:
    logging.warning(
      '%s cannot be written (%s): the reference is computed anew each time',
      *(path, error),
    )


def _read_entry(path: files.Path) -> dict[str, np.ndarray] | None:
  """Cached features; None if they are absent or damaged."""
  if not files.exists(path):
    return None
  try:
    file = npz_files.NpzFile(path)
    return {name: file.read(name) for name in file.shapes}
  except errors.DataError as error:
    logging.warning('%s; computing it again', error)
    return None
