"""Loads the frozen networks that a tokenizer's configuration names."""

from collections.abc import Callable
from typing import Any

import ml_collections

from selfboottok_jax import errors, pretrained
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.pretrained import dino


class Loader:
  """Loads networks one by one, and reports all that lack weights at once."""

  def __init__(self, *, abstract: bool):
    """Starts with nothing loaded.

    With `abstract`, networks get shapes in place of parameters, and no file is
    read or fetched.
    """
    self._abstract = abstract
    self._loaded: dict[Any, Any] = {}
    self._lacking: list[str] = []

  def terms(
    self,
    config: ml_collections.ConfigDict,
    model: tokenizer_lib.Tokenizer,
    active: tuple[str, ...],
  ) -> dict[str, Any]:
    """The networks of the `active` terms, on the tokenizer's grid of patches.

    Terms that name the same network share it.
    """
    patches = pretrained.Patches(
      model.image_size,
      model.patch_size,
      model.token_dim,
      model.dtype,
      model.attention,
    )
    networks = {}
    for term in active:
      load: Callable[..., Any] = pretrained.load_network
      if term == 'perceptual':
        load = pretrained.load_perceptual
      networks[term] = self._load(load, config.networks[term], patches=patches)
    return networks

  def trunk(self, spec: str, dtype: str, attention: str) -> dino.DinoTrunk:
    """The frozen trunk of a discriminator of kind 'dino'."""
    return self._load(
      pretrained.load_trunk, spec, dtype=dtype, attention=attention
    )

  def check(self) -> None:
    """Raises WeightsError if any network could not be loaded.

    Until then None stands for such a network.
    """
    if len(self._lacking) == 1:
      raise errors.WeightsError(self._lacking[0])
    if self._lacking:
      raise errors.WeightsError(
        f'{len(self._lacking)} networks lack weights: '
        f'{" | ".join(self._lacking)}'
      )

  def _load(self, load: Callable[..., Any], spec: str, **options: Any) -> Any:
    key = load, spec
    if key not in self._loaded:
      self._loaded[key] = None
      try:
        self._loaded[key] = load(spec, abstract=self._abstract, **options)
      except errors.WeightsError as error:
        self._lacking.append(str(error))
    return self._loaded[key]
