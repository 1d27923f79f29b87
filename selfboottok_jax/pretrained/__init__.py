"""Frozen networks: teachers, 2D latents and perceptual distances.

A spec is a name; for networks with weights it may go on as 'name:SOURCE', a
file, a folder or an id on the Hugging Face hub in place of the published one,
or as 'name:random'.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from selfboottok_jax import errors
from selfboottok_jax.pretrained import (
  builtin,
  contract,
  dino,
  distance,
  inception,
  latents,
  lpips,
  lpips_backbones,
  mobilenet,
  published,
  store,
  vision,
  vit,
)

Features = contract.Features
FeatureNetwork = contract.FeatureNetwork
PerceptualDistance = contract.PerceptualDistance

RANDOM = 'random'
# Of options, in words.
KINDS = {int: 'a whole number', str: 'a name', bool: 'True or False'}


def _hog_distance(
  patch_size: int = 8, cells: int = 2, bins: int = 8
) -> distance.FeatureDistance:
  return distance.FeatureDistance(builtin.Hog(patch_size, cells, bins))


def _random_distance(
  patch_size: int = 8, dim: int = 64, seed: int = 0
) -> distance.FeatureDistance:
  return distance.FeatureDistance(builtin.init_random(patch_size, dim, seed))


def _hog(patch_size: int = 16, cells: int = 2, bins: int = 8) -> builtin.Hog:
  return builtin.Hog(patch_size, cells, bins)


def _dct(patch_size: int = 16, dim: int = 32) -> builtin.Dct:
  return builtin.Dct(patch_size, dim)


def _each(build: Callable[..., Any], names: Any) -> dict[str, Any]:
  return {name: functools.partial(build, name) for name in names}


# What these make has no parameters yet if it is Weighted.
NETWORKS: dict[str, Callable[..., FeatureNetwork]] = {
  'hog': _hog,
  'dct': _dct,
  'random': builtin.init_random,
  'mobilenet_v2': mobilenet.build,
  'inception': inception.build,
  **_each(vision.build, vision.VARIANTS),
  **_each(latents.build, latents.VARIANTS),
}

PERCEPTUALS: dict[str, Callable[..., PerceptualDistance]] = {
  'hog': _hog_distance,
  'random': _random_distance,
  **{
    f'lpips_{name}': functools.partial(lpips.build, name)
    for name in lpips_backbones.BACKBONES
  },
}

# What discriminators of kind 'dino' stand on.
TRUNKS: dict[str, Callable[..., dino.DinoTrunk]] = _each(
  dino.build, dino.VARIANTS
)


def load_network(
  spec: str, *, abstract: bool = False, **options: Any
) -> FeatureNetwork:
  """Loads a feature network.

  Args:
    spec: a name of NETWORKS, for those with weights with ':SOURCE' if they are
      not to come from where they are published.
    abstract: take shapes in place of parameters, and read no file; for
      programs that are compiled but not run. A file that is named has to be
      there.
    **options: of the function in NETWORKS.

  Returns:
    The network, its parameters in `params`.

  Raises:
    UserError: unknown name or option, a source missing or too many, or a
      WeightsError for the file.
  """
  return _load('feature network', NETWORKS, spec, options, abstract)


def load_perceptual(
  spec: str, *, abstract: bool = False, **options: Any
) -> PerceptualDistance:
  """Loads a perceptual distance; as `load_network`, from PERCEPTUALS."""
  return _load('perceptual distance', PERCEPTUALS, spec, options, abstract)


def load_trunk(
  spec: str, *, abstract: bool = False, **options: Any
) -> dino.DinoTrunk:
  """Loads the trunk of a discriminator; as `load_network`, from TRUNKS."""
  return _load('discriminator trunk', TRUNKS, spec, options, abstract)


def published_networks() -> dict[str, published.Published]:
  """Place, licence and use of every network that is published, by name."""
  places = {
    name: getattr(build(), 'published', None)
    for choices in (PERCEPTUALS, NETWORKS, TRUNKS)
    for name, build in choices.items()
  }
  return {name: place for name, place in places.items() if place}


def load_vit(
  spec: str,
  *,
  grid: tuple[int, int],
  patch_size: int,
  abstract: bool = False,
) -> tuple[vit.Vit, PyTree]:
  """A teacher's transformer on its own, and its parameters.

  Args:
    spec: of a vision transformer among NETWORKS.
    grid: rows and columns of its position table; they are equal.
    patch_size: of its patch embedding.
    abstract: as of `load_network`.

  Raises:
    UserError: as `load_network`, or another kind of network.
  """
  name = spec.partition(':')[0]
  if name not in vision.VARIANTS:
    raise errors.UserError(
      f'{spec!r} is no vision transformer; choose one of '
      f'{", ".join(vision.VARIANTS)}'
    )
  network = load_network(
    spec, abstract=abstract, grid=grid[0], patch_size=patch_size
  )
  return network.vit, network.params


def _load(
  kind: str,
  choices: Mapping[str, Callable[..., Any]],
  spec: str,
  options: Mapping[str, Any],
  abstract: bool,
) -> Any:
  name, colon, source = spec.partition(':')
  if name not in choices:
    raise errors.UserError(
      f'unknown {kind} {name!r} in {spec!r}; choose one of {", ".join(choices)}'
    )
  known = list(inspect.signature(choices[name]).parameters)
  unknown = [option for option in options if option not in known]
  if unknown:
    raise errors.UserError(
      f'{kind} {name!r} has no option {", ".join(unknown)}; it has '
      f'{", ".join(known) or "none"}'
    )
  for option, value in options.items():
    wanted = inspect.signature(choices[name]).parameters[option].annotation
    if type(value) is not wanted:
      raise errors.UserError(
        f'{kind} {name!r} got {option}={value!r}; wanted {KINDS[wanted]}'
      )
  network = choices[name](**options)
  if not isinstance(network, contract.Weighted):
    if colon:
      raise errors.UserError(
        f'{kind} {name!r} takes no source, got {spec!r}; write {name}'
      )
    return network
  params = _params(network, source, abstract)
  return dataclasses.replace(network, params=params)


def _params(network: contract.Weighted, source: str, abstract: bool) -> PyTree:
  """Shapes, random numbers or what a file holds."""
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
