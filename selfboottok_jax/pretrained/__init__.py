"""Frozen networks: teachers, 2D latents and perceptual distances.

A spec is a name. For networks with weights it may go on as 'name:SOURCE', a
file, a folder or an id on the Hugging Face hub in place of the published one,
or as 'name:random'.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from selfboottok_jax import errors, sizes
from selfboottok_jax.pretrained import (
  autoencoders,
  builtin,
  contract,
  convnext,
  dino,
  inception,
  lpips,
  mobilenet,
  released_generators,
  released_softvq,
  store,
  vision,
  vit,
)

Features = contract.Features
FeatureNetwork = contract.FeatureNetwork
PerceptualDistance = contract.PerceptualDistance

# Source of random weights.
RANDOM = 'random'
# Networks without weights, which take patches of any size.
BUILTIN = ('hog', 'dct', 'random')


@dataclasses.dataclass(frozen=True)
class Patches:
  """A tokenizer's grid of patches, to which a network is brought.

  Attributes:
    image_size: side of the images, or (height, width), in pixels.
    patch_size: side of a patch, in pixels.
    dim: width of a patch vector, for networks that offer any.
    dtype: floating-point type of the computation, for networks with a choice.
    attention: implementation, see `layers.Attention`; likewise.
    native: True shows vision transformers patches of the size that they were
      trained with, instead of the size that is usual for teachers: DINOv2 at
      256 pixels sees 16 x 16 patches of 14, as in REPA and REG.
  """

  image_size: sizes.Size
  patch_size: int
  dim: int
  dtype: str = 'float32'
  attention: str = 'auto'
  native: bool = False

  @property
  def grid(self) -> tuple[int, int]:
    """Rows and columns of patches."""
    return sizes.grid(self.image_size, self.patch_size)


Options = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The making of a network.

  Attributes:
    build: makes it from its options; one with weights (`contract.Weighted`)
      has no parameters yet.
    options: name to type of each keyword argument of `build`.
    fit: options that bring it to a tokenizer's patches.
  """

  build: Callable[..., Any]
  options: Mapping[str, type] = dataclasses.field(default_factory=dict)
  fit: Callable[[Patches], Options] = lambda patches: {}


def _with_size(patches: Patches) -> Options:
  return {'patch_size': patches.patch_size}


def _with_size_and_dim(patches: Patches) -> Options:
  return {'patch_size': patches.patch_size, 'dim': patches.dim}


def _on_grid(patches: Patches) -> Options:
  grid = sizes.canonical(patches.grid, 'grid')
  return {'grid': grid, 'dtype': patches.dtype}


def _on_stride(stride: int) -> Callable[[Patches], Options]:
  def fit(patches: Patches) -> Options:
    # The size of images whose map at the network's stride has that grid.
    rows, columns = patches.grid
    return {'image_size': sizes.canonical((stride * rows, stride * columns))}

  return fit


def _transformer(name: str) -> Recipe:
  def fit(patches: Patches) -> Options:
    size = vision.TEACHERS[name].family.patch_size if patches.native else 0
    attention = {'attention': patches.attention}
    return {**_on_grid(patches), **attention, 'patch_size': size}

  return Recipe(
    lambda **options: vision.build(name, **options),
    {'grid': sizes.AnySize, 'patch_size': int, 'dtype': str, 'attention': str},
    fit,
  )


def _autoencoder(name: str) -> Recipe:
  return Recipe(
    lambda **options: autoencoders.build(name, **options),
    {'grid': sizes.AnySize, 'dtype': str, 'decodes': bool},
    _on_grid,
  )


_HOG = {'patch_size': int, 'cells': int, 'bins': int}
_RANDOM = {'patch_size': int, 'dim': int, 'seed': int}

NETWORKS: dict[str, Recipe] = {
  'hog': Recipe(builtin.Hog, _HOG, _with_size),
  'dct': Recipe(
    builtin.Dct, {'patch_size': int, 'dim': int}, _with_size_and_dim
  ),
  'random': Recipe(builtin.init_random, _RANDOM, _with_size_and_dim),
  'mobilenet_v2': Recipe(
    mobilenet.MobileNetV2,
    {'image_size': sizes.AnySize},
    _on_stride(mobilenet.STRIDE),
  ),
  **{
    name: Recipe(
      functools.partial(convnext.ConvNext, name),
      {'image_size': sizes.AnySize},
      _on_stride(convnext.STRIDE),
    )
    for name in convnext.NETWORKS
  },
  'inception': Recipe(inception.Inception, {'resize': str}),
  **{name: _transformer(name) for name in vision.TEACHERS},
  **{name: _autoencoder(name) for name in autoencoders.AUTOENCODERS},
}


def _feature_distance(
  build: Callable[..., Any],
) -> Callable[..., builtin.FeatureDistance]:
  # Finer patches than those of a teacher.
  return lambda **options: builtin.FeatureDistance(
    build(**{'patch_size': 8, **options})
  )


PERCEPTUALS: dict[str, Recipe] = {
  'hog': Recipe(_feature_distance(builtin.Hog), _HOG, _with_size),
  'random': Recipe(
    _feature_distance(builtin.init_random), _RANDOM, _with_size_and_dim
  ),
  **{
    f'lpips_{name}': Recipe(
      lambda name=name, **options: lpips.build(name, **options),
      {'dtype': str},
      lambda patches: {'dtype': patches.dtype},
    )
    for name in lpips.BACKBONES
  },
}

# Trunks of discriminators of kind 'dino'.
TRUNKS: dict[str, Recipe] = {
  name: Recipe(
    lambda name=name, **options: dino.build(name, **options),
    {'dtype': str, 'attention': str},
  )
  for name in dino.TRUNKS
}


def load_network(
  spec: str,
  *,
  patches: Patches | None = None,
  abstract: bool = False,
  **options: Any,
) -> FeatureNetwork:
  """Loads a feature network.

  Args:
    spec: a name of NETWORKS, for those with weights with ':SOURCE' if they are
      not to come from the published place.
    patches: a tokenizer's grid, to which the network is brought.
    abstract: take shapes in place of parameters, and read no file; for
      programs that are compiled but not run. A file that is named has to be
      there.
    **options: options of its recipe, in place of those that `patches` implies.

  Returns:
    The network, its parameters in `params`.

  Raises:
    UserError: unknown name or option, a source missing or too many, or a
      WeightsError for the file.
  """
  return _load('feature network', NETWORKS, spec, patches, abstract, options)


def load_perceptual(
  spec: str,
  *,
  patches: Patches | None = None,
  abstract: bool = False,
  **options: Any,
) -> PerceptualDistance:
  """Loads a perceptual distance; as `load_network`, from PERCEPTUALS."""
  return _load(
    'perceptual distance', PERCEPTUALS, spec, patches, abstract, options
  )


def load_trunk(
  spec: str, *, abstract: bool = False, **options: Any
) -> dino.DinoTrunk:
  """Loads the trunk of a discriminator; as `load_network`, from TRUNKS."""
  return _load('discriminator trunk', TRUNKS, spec, None, abstract, options)


def load_vit(
  spec: str,
  *,
  grid: tuple[int, int],
  patch_size: int,
  abstract: bool = False,
) -> tuple[vit.Vit, PyTree]:
  """A teacher's transformer on its own, and its parameters.

  Args:
    spec: spec of a vision transformer among NETWORKS.
    grid: rows and columns of its position table.
    patch_size: side of the patches of its embedding, in pixels.
    abstract: as in `load_network`.

  Raises:
    UserError: as `load_network`, or another kind of network.
  """
  if spec.partition(':')[0] not in vision.TEACHERS:
    raise errors.UserError(
      f'{spec!r} is no vision transformer; choose one of '
      f'{", ".join(vision.TEACHERS)}'
    )
  network: Any = load_network(
    spec, abstract=abstract, grid=grid, patch_size=patch_size
  )
  return network.vit, network.params


def load_latents(
  spec: str, image_size: sizes.Size, *, abstract: bool = False
) -> autoencoders.LatentNetwork:
  """Loads an autoencoder that decodes, for images of a size.

  Args:
    spec: 'NAME', 'NAME:SOURCE' or 'NAME:random' of `autoencoders.AUTOENCODERS`.
    image_size: side of the images, or (height, width); multiples of 16.
    abstract: as in `load_network`.

  Raises:
    UserError: an unknown name or another size.
    WeightsError: see `store.load`.
  """
  size = autoencoders.PATCH_SIZE
  if any(side < size or side % size for side in sizes.pair(image_size)):
    raise errors.UserError(
      f'image_size={image_size} with {spec}; wanted a multiple of {size}'
    )
  grid = sizes.canonical(sizes.grid(image_size, size), 'grid')
  network: Any = load_network(spec, grid=grid, decodes=True, abstract=abstract)
  return network


def load_autoencoder(
  spec: str, image_size: sizes.Size = 256
) -> autoencoders.ImageAutoencoder:
  """Loads an autoencoder as a tokenizer; see `load_latents`."""
  return autoencoders.ImageAutoencoder(load_latents(spec, image_size))


def is_at_hand(spec: str) -> bool:
  """True if a network, or a distance, has weights that are on this machine.

  Args:
    spec: of NETWORKS or PERCEPTUALS, with published weights or a source;
      random ones are none.
  """
  name, _, source = spec.partition(':')
  recipes = PERCEPTUALS if name in PERCEPTUALS else NETWORKS
  network = recipes[name].build()
  if source == RANDOM or not isinstance(network, contract.Weighted):
    return False
  return store.is_at_hand(
    network.name, source, network.published, network.shape_key
  )


def published_networks() -> dict[str, contract.Published]:
  """Place, licence and use of every network that is published, by name.

  Generators are not among them.
  """
  places = {
    name: getattr(recipe.build(), 'published', None)
    for recipes in (PERCEPTUALS, NETWORKS, TRUNKS)
    for name, recipe in recipes.items()
  } | released_softvq.RELEASED
  return {name: place for name, place in places.items() if place}


def import_network(spec: str, **options: Any) -> list[dict[str, Any]]:
  """Imports the weights of a network or a distance into the cache.

  Args:
    spec: 'NAME' or 'NAME:SOURCE'.
    **options: options of its recipe.

  Returns:
    The records of its weight files, see `store.watch`; there is usually one.

  Raises:
    UserError: no such network or option, or one without weights.
    WeightsError: see `store.load`.
  """
  name = spec.partition(':')[0]
  for what, table in (
    ('generator', released_generators.RELEASED),
    ('softvq', released_softvq.RELEASED),
  ):
    if name in table:
      kind = 'tokenizer' if what == 'softvq' else what
      raise errors.ConfigError(
        f'--network={spec} is a {kind}, which becomes a run: python -m '
        f'launch.import_{what} --network={spec} --workdir=RUN'
      )
  loaders: Iterable[tuple[Mapping[str, Recipe], Callable[..., Any]]] = (
    (PERCEPTUALS, load_perceptual),
    (NETWORKS, load_network),
    (TRUNKS, load_trunk),
  )
  loader = next((load for recipes, load in loaders if name in recipes), None)
  if loader is None:
    known = dict.fromkeys(name for recipes, _ in loaders for name in recipes)
    raise errors.ConfigError(
      f'--network={spec} is none; wanted one of {", ".join(known)}'
    )
  with store.watch() as records:
    loader(spec, **options)
  if not records:
    raise errors.ConfigError(
      f'--network={spec} has no weights to import; it can be used as it is'
    )
  return records


def _load(
  kind: str,
  recipes: Mapping[str, Recipe],
  spec: str,
  patches: Patches | None,
  abstract: bool,
  options: Options,
) -> Any:
  """Builds a network and loads its parameters, if it has any."""
  name, colon, source = spec.partition(':')
  if name not in recipes:
    raise errors.UserError(
      f'unknown {kind} {name!r} in {spec!r}; choose one of {", ".join(recipes)}'
    )
  recipe = recipes[name]
  unknown = [option for option in options if option not in recipe.options]
  if unknown:
    raise errors.UserError(
      f'{kind} {name!r} has no option {", ".join(unknown)}; it has '
      f'{", ".join(recipe.options) or "none"}'
    )
  words = {
    int: 'a whole number',
    str: 'a name',
    bool: 'True or False',
    sizes.AnySize: 'a whole number, or two as 16x24',
  }
  for option, value in options.items():
    wanted = recipe.options[option]
    if wanted is sizes.AnySize:
      if isinstance(value, str) and 'x' in value:
        options[option] = value = sizes.parse(value)
      is_pair = isinstance(value, tuple) and len(value) == 2
      fits = all(type(v) is int for v in (value if is_pair else (value,)))
    else:
      # Not isinstance: True is no whole number.
      fits = type(value) is wanted
    if not fits:
      raise errors.UserError(
        f'{kind} {name!r} got {option}={value!r}; wanted {words[wanted]}'
      )
  implied = recipe.fit(patches) if patches else {}
  network = recipe.build(**{**implied, **options})
  if not isinstance(network, contract.Weighted):
    if colon:
      raise errors.UserError(
        f'{kind} {name!r} takes no source, got {spec!r}; write {name}'
      )
    return network
  weighted: Any = network
  return dataclasses.replace(
    weighted, params=_params(network, source, abstract)
  )


def _params(network: contract.Weighted, source: str, abstract: bool) -> PyTree:
  """Shapes, random numbers or the content of a file."""
  key = jax.random.key(0)
  if abstract:
    if source not in ('', RANDOM):
      # A file that is named should be there, though nobody needs it yet.
      store.find(network.name, source, network.published)
    return jax.eval_shape(network.init, key)
  if source == RANDOM:
    return jax.jit(network.init)(key)
  return store.load(
    network.name,
    source,
    network.published,
    network.shape_key,
    network.read,
  )
