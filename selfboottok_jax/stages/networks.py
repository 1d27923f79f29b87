"""The frozen networks that a configuration names."""

from collections.abc import Callable
from typing import Any

import ml_collections

from selfboottok_jax import errors, pretrained
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.pretrained import dino
from selfboottok_jax.stages import encoder_init, objective


class Loader:
  """Loads one network after the other, and tells of all that lack at once.

  A network of which only shapes are wanted (`abstract`) is not read, and not
  fetched.
  """

  def __init__(self, *, abstract: bool):
    """Starts with nothing loaded."""
    self._abstract = abstract
    self._loaded: dict[Any, Any] = {}
    self._lacking: list[str] = []

  def terms(
    self,
    config: ml_collections.ConfigDict,
    model: tokenizer_lib.Tokenizer,
    active: tuple[str, ...],
  ) -> dict[str, Any]:
    """Networks of these terms, on the tokenizer's grid of patches.

    Terms that name the same network share it.
    """
    patches = pretrained.Patches(
      model.image_size, model.patch_size, model.token_dim, model.dtype
    )
    networks = {}
    for term in active:
      load: Callable[..., Any] = pretrained.load_network
      if term == 'perceptual':
        load = pretrained.load_perceptual
      networks[term] = self._load(load, config.networks[term], patches=patches)
    return networks

  def trunk(self, spec: str, dtype: str) -> dino.DinoTrunk:
    """What a discriminator of kind 'dino' stands on."""
    return self._load(pretrained.load_trunk, spec, dtype=dtype)

  def check(self) -> None:
    """Raises WeightsError if any of them could not be loaded.

    Until then None stands for it.
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


def check_encoder(
  config: ml_collections.ConfigDict, model: tokenizer_lib.Tokenizer
) -> None:
  """Raises a UserError where a fresh encoder could not start as it should."""
  spec = config.encoder_from
  if not spec or config.init_from:
    return
  encoder_init.check_gains(model, spec)
  network, _ = pretrained.load_vit(
    spec,
    grid=encoder_init.GRID,
    patch_size=encoder_init.PATCH_SIZE,
    abstract=True,
  )
  encoder_init.check_sizes(model, network, spec)


def active_terms(
  config: ml_collections.ConfigDict,
  model: tokenizer_lib.Tokenizer,
  goal: objective.Objective,
) -> tuple[str, ...]:
  """The terms that need a network, of what the task trains."""
  trainable = tuple(config.trainable) if 'trainable' in config else None
  return objective.active_terms(model, goal, trainable)
