"""Features of a set of images, streamed: their moments, and those to be kept.

Features are computed on all devices of a mesh while the host adds up those of
the batch before. Every process adds up the features of all processes, in the
order of the images and in chunks of one size: the result depends on the images
alone, not on batches, devices or processes.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree, UInt8

from selfboottok_jax import errors, pixels, pretrained, trees
from selfboottok_jax.evaluation import frechet
from selfboottok_jax.pretrained import contract, inception, store, vision
from selfboottok_jax.training import sharding

# Protocols of Inception that have published numbers, with their resize.
CONVENTIONS = {
  'adm': 'tf1',
  'torch_fidelity': 'tf1',
  'pytorch_fid': 'half_pixel',
}
# Kinds of features: one vector per image that Frechet distances and neighbours
# are about; and of Inception what sFID and the inception score read.
POOL, SPATIAL, LOGITS = 'pool', 'spatial', 'logits'
# Features whose moments are computed at a time.
_CHUNK = 512


@dataclasses.dataclass(frozen=True, eq=False)
class SetNetwork:
  """A network whose features a set of images is compared by.

  Attributes:
    network: the network with its parameters.
    is_official: True for Inception with the weights of 2015-12-05, with which
      a Frechet distance is called FID.
    is_random: True for weights that were drawn at random.
  """

  network: contract.FeatureNetwork
  is_official: bool = False
  is_random: bool = False

  @property
  def name(self) -> str:
    """Name in reports."""
    return self.network.name

  @functools.cached_property
  def weights(self) -> str:
    """A digest of the parameters."""
    return trees.weights_hash(self.network.params)

  @property
  def protocol(self) -> dict[str, Any]:
    """Part of a score's protocol."""
    resize = getattr(self.network, 'resize', None)
    # Networks without weights have one.
    patch_size = getattr(self.network, 'patch_size', None)
    if isinstance(self.network, vision.VisionTransformer):
      patch = self.network.vit.patch_size
      height, width = (side * patch for side in self.network.vit.grid)
      resize = f'bicubic to {height}x{width}'
    return {
      'network': self.name,
      'weights': self.weights,
      **({'resize': resize} if resize else {}),
      **({'patch_size': patch_size} if patch_size else {}),
    }

  @property
  def identity(self) -> dict[str, Any]:
    """All that its features depend on besides the images, as texts."""
    fields = {
      field.name: repr(getattr(self.network, field.name))
      for field in dataclasses.fields(self.network)  # type: ignore[arg-type]
      if field.name not in ('params', 'published')
    }
    return {**fields, **self.protocol}

  def key(self, kind: str) -> str:
    """Name of its features of a kind."""
    return f'{self.name}/{kind}'

  def widths(self) -> dict[str, int]:
    """Kind to number of features."""
    side = 16 * getattr(self.network, 'patch_size', 4)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(self.features, self.network.params, image)
    return {kind: shape.shape[1] for kind, shape in shapes.items()}

  def features(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> dict[str, Float[Array, 'b _']]:
    """Features of each kind for images in [-1, 1]."""
    if isinstance(self.network, inception.Inception):
      measured = self.network.measure(params, images)
      return {
        POOL: measured.pooled[self.network.dim],
        SPATIAL: measured.spatial,
        LOGITS: measured.logits_unbiased,
      }
    pooled = self.network(params, images).pooled
    return {POOL: pooled.astype(jnp.float32)}


def load(spec: str, convention: str = 'adm', **options: Any) -> SetNetwork:
  """Loads a feature network to compare sets of images by.

  Args:
    spec: see `pretrained.load_network`.
    convention: one of CONVENTIONS; of Inception it chooses the resize.
    **options: of the network.

  Raises:
    UserError: an unknown convention, or as `pretrained.load_network`.
  """
  errors.require_choice('convention', convention, CONVENTIONS)
  name, _, source = spec.partition(':')
  if name == 'inception':
    options = {'resize': CONVENTIONS[convention], **options}
  elif name in vision.TEACHERS:
    # Patches as it was trained with, on a grid that it may have seen: not those
    # of a tokenizer, to which teachers are brought.
    family = vision.TEACHERS[name].family
    native = {'patch_size': family.patch_size, 'grid': min(family.grid, 16)}
    options = native | options
  with store.watch() as records:
    network = pretrained.load_network(spec, **options)
  digests = [d for r in records for d in (r.get('files') or {}).values()]
  return SetNetwork(
    network,
    is_official=name == 'inception'
    and any(digest.startswith(inception.DIGEST) for digest in digests),
    is_random=pretrained.RANDOM in (name, source),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
  """The features of a set that its scores need.

  Attributes:
    networks: networks with names of their own.
    moments: keys (`SetNetwork.key`) of features of which the mean and the
      covariance are needed.
    kept: keys of features that are needed one by one.
    mesh: devices to compute on.
  """

  networks: tuple[SetNetwork, ...]
  moments: tuple[str, ...]
  kept: tuple[str, ...]
  mesh: Mesh

  def network_of(self, key: str) -> SetNetwork:
    """The network that has the features."""
    return next(n for n in self.networks if n.name == key.partition('/')[0])

  def width(self, key: str) -> int:
    """Number of features."""
    return self.network_of(key).widths()[key.partition('/')[2]]


class SetFeatures:
  """Collects the wanted features of images that come in batches."""

  def __init__(self, wanted: Wanted, most_kept: int = 0, of: int = 0):
    """Starts with no image.

    Args:
      wanted: the features to collect.
      most_kept: keep features of so many images, spread evenly; 0 for all.
      of: number of images that are going to be added, with `most_kept`.
    """
    self.wanted = wanted
    self._every = (most_kept, of) if 0 < most_kept < of else None
    self.count = 0
    self.image_size: tuple[int, int] | None = None
    self._moments = {key: frechet.Moments() for key in wanted.moments}
    self._kept: dict[str, list[np.ndarray]] = {key: [] for key in wanted.kept}
    self._waiting: dict[str, list[np.ndarray]] = {k: [] for k in wanted.moments}
    self._rows = 0
    self._running: dict[str, Array] | None = None
    self._params, self._compute = _place(wanted)

  def add(self, batch: Mapping[str, Any]) -> None:
    """Adds a batch.

    Args:
      batch: 'image' uint8 [b, h, w, 3] and 'mask' bool [b], False for padding:
        numpy arrays of this process, as many rows as in every other one, or jax
        arrays with the rows of all processes.
    """
    images, mask = batch['image'], batch['mask']
    if images.dtype != np.uint8:
      raise errors.DataError(
        f'images of type {images.dtype} to score; wanted uint8, as files have '
        'them: see pixels.to_uint8'
      )
    size = (int(images.shape[1]), int(images.shape[2]))
    if self.image_size not in (None, size):
      raise errors.DataError(
        f'images of {size} pixels after some of {self.image_size}; give images '
        'of one size'
      )
    self.image_size = size
    running = self._compute(self._params, *self._put(images, mask))
    # Only now: devices compute while the host adds up.
    self._absorb()
    self._running = running

  def finish(self) -> None:
    """Takes in what is still being computed; more may be added after it."""
    self._absorb()
    for key, waiting in self._waiting.items():
      if waiting:
        self._moments[key].add(np.concatenate(waiting))
        self._waiting[key] = []

  def gaussian(self, key: str) -> frechet.Gaussian:
    """The fit of features of `wanted.moments`, after `finish`."""
    return self._moments[key].gaussian()

  def features(self, key: str) -> Float[np.ndarray, 'n d']:
    """Features of `wanted.kept`, in the order of the images, after `finish`."""
    if not self._kept[key]:
      raise errors.DataError('no images to score; give some')
    self._kept[key] = [np.concatenate(self._kept[key])]
    return self._kept[key][0]

  def _put(self, images: Any, mask: Any) -> tuple[Array, Array]:
    """Splits a batch over the devices, with padding to fill them."""
    mesh = self.wanted.mesh
    where = sharding.batch_sharding(mesh)
    if isinstance(images, jax.Array) and not images.is_fully_addressable:
      return jax.device_put((images, jnp.asarray(mask)), where)
    images, mask = np.asarray(images), np.asarray(mask, bool)
    # As many rows as ever: another number would compile another program.
    devices = len(mesh.local_devices)
    self._rows = max(self._rows, -(-len(images) // devices) * devices)
    padding = self._rows - len(images)
    images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
    put: tuple[Array, Array] = sharding.put_batch(
      (images, np.pad(mask, (0, padding))), mesh
    )
    return put

  def _absorb(self) -> None:
    """Adds up the batch that was given to the devices last."""
    if self._running is None:
      return
    found = jax.tree.map(np.asarray, self._running)
    self._running = None
    mask = found.pop('mask')
    places = self.count + np.arange(int(mask.sum()))
    self.count += len(places)
    keep = np.ones(len(places), bool)
    if self._every:
      most, total = self._every
      # True so often that the whole number below grows `most` times.
      keep = (places + 1) * most // total > places * most // total
    for key, features in found.items():
      rows = features[mask]
      if key in self._kept and keep.any():
        _check_finite(rows)
        self._kept[key].append(rows[keep])
      if key in self._moments:
        self._add_moments(key, rows)

  def _add_moments(self, key: str, rows: Float[np.ndarray, 'b d']) -> None:
    waiting = np.concatenate([*self._waiting[key], rows])
    while len(waiting) >= _CHUNK:
      self._moments[key].add(waiting[:_CHUNK])
      waiting = waiting[_CHUNK:]
    self._waiting[key] = [waiting]


def _check_finite(rows: Float[np.ndarray, 'b d']) -> None:
  if not np.isfinite(rows).all():
    raise errors.DataError(
      'features of an image are not finite numbers, so no score exists; look '
      'at the weights of the network'
    )


def _place(wanted: Wanted) -> tuple[PyTree, Callable[..., dict[str, Array]]]:
  """Parameters on every device, and the program of the features."""
  everywhere = sharding.replicated(wanted.mesh)
  params = jax.device_put(
    {n.name: n.network.params for n in wanted.networks}, everywhere
  )
  keys = {*wanted.moments, *wanted.kept}

  # Replicated at the end: every process sees the features of all.
  @functools.partial(jax.jit, out_shardings=everywhere)
  def compute(
    params: PyTree, images: UInt8[Array, 'b h w 3'], mask: Array
  ) -> dict[str, Array]:
    pictures = pixels.to_float(images)
    found = {'mask': mask}
    for network in wanted.networks:
      features = network.features(params[network.name], pictures)
      named = {network.key(kind): x for kind, x in features.items()}
      found |= {key: x for key, x in named.items() if key in keys}
    return found

  def in_mesh(*arguments: Any) -> dict[str, Array]:
    # Kernels of some networks ask which mesh they are on.
    with jax.set_mesh(wanted.mesh):
      return compute(*arguments)

  return params, in_mesh


def as_networks(
  networks: Sequence[str | SetNetwork | contract.FeatureNetwork],
  convention: str = 'adm',
) -> tuple[SetNetwork, ...]:
  """Networks to compare sets by, loaded where only a spec is given.

  Raises:
    ConfigError: none, or two of one name.
    UserError: as `load`.
  """
  found = []
  for network in networks:
    if isinstance(network, str):
      network = load(network, convention)
    elif not isinstance(network, SetNetwork):
      network = SetNetwork(network)
    found.append(network)
  names = [network.name for network in found]
  if not names or len(set(names)) < len(names):
    raise errors.ConfigError(
      f'networks {", ".join(names) or "none"} to compare sets of images by; '
      'wanted one or more, each once'
    )
  return tuple(found)
