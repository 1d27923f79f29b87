"""Frozen networks: teachers, 2D latents and perceptual distances.

A spec is a name, and for networks with a weight file 'name:PATH'.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from selfboottok_jax import errors
from selfboottok_jax.pretrained import (
  builtin,
  contract,
  distance,
  lpips,
  mobilenet,
)

Features = contract.Features
FeatureNetwork = contract.FeatureNetwork
PerceptualDistance = contract.PerceptualDistance


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


# A loader whose first argument is `path` reads a weight file.
NETWORKS: dict[str, Callable[..., FeatureNetwork]] = {
  'hog': _hog,
  'dct': _dct,
  'random': builtin.init_random,
  'mobilenet_v2': mobilenet.load_mobilenet,
}

PERCEPTUALS: dict[str, Callable[..., PerceptualDistance]] = {
  'hog': _hog_distance,
  'random': _random_distance,
  'lpips_squeeze': lpips.load_squeeze,
  'lpips_vgg': lpips.load_vgg,
  'lpips_alex': lpips.load_alex,
}


def load_network(spec: str, **options: Any) -> FeatureNetwork:
  """Loads a feature network.

  Args:
    spec: 'hog', 'dct', 'random' or 'mobilenet_v2:PATH'.
    **options: hog: patch_size, cells, bins; dct: patch_size, dim; random:
      patch_size, dim, seed; mobilenet_v2: image_size.

  Returns:
    The network, its parameters in `params`.

  Raises:
    UserError: unknown name or option, a path missing or too many, or a
      WeightsError for the file.
  """
  return _load('feature network', NETWORKS, spec, options)


def load_perceptual(spec: str, **options: Any) -> PerceptualDistance:
  """Loads a perceptual distance.

  Args:
    spec: 'hog', 'random', or 'lpips_squeeze:PATH', 'lpips_vgg:PATH',
      'lpips_alex:PATH'.
    **options: those of the network of that name; lpips_* have none.

  Returns:
    The distance, its parameters in `params`.

  Raises:
    UserError: as `load_network`.
  """
  return _load('perceptual distance', PERCEPTUALS, spec, options)


def _load(
  kind: str,
  choices: Mapping[str, Callable[..., Any]],
  spec: str,
  options: Mapping[str, Any],
) -> Any:
  name, _, path = spec.partition(':')
  if name not in choices:
    raise errors.UserError(
      f'unknown {kind} {name!r} in {spec!r}; choose one of {", ".join(choices)}'
    )
  known = list(inspect.signature(choices[name]).parameters)
  reads_file = known[0] == 'path'
  if reads_file and not path:
    raise errors.WeightsError(
      f'{kind} {spec!r} needs a weight file; write {name}:PATH'
    )
  if path and not reads_file:
    raise errors.UserError(
      f'{kind} {name!r} takes no path, got {spec!r}; write {name}'
    )
  known = known[reads_file:]
  unknown = [option for option in options if option not in known]
  if unknown:
    raise errors.UserError(
      f'{kind} {name!r} has no option {", ".join(unknown)}; it has '
      f'{", ".join(known) or "none"}'
    )
  arguments = (path,) if reads_file else ()
  return choices[name](*arguments, **options)
