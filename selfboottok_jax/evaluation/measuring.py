"""Measures a plan's metrics of images that come in batches."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from selfboottok_jax import inference, pixels, pretrained, sizes
from selfboottok_jax.evaluation import (
  codes,
  metrics,
  paired,
  references,
  set_features,
  set_scores,
  transport_health,
)
from selfboottok_jax.training import sharding

# Opens a reference set for the features that scores want of it.
Opener = Callable[[set_features.Wanted], references.Reference]


class Measuring:
  """The metrics of a plan but those of codes, of one set of images."""

  def __init__(
    self,
    plan: metrics.Plan,
    mesh: Mesh,
    openers: Mapping[str, Opener],
    *,
    image_size: sizes.Size,
    convention: str = 'adm',
  ):
    """Loads networks and opens references; no image is seen yet.

    Args:
      plan: what to measure, checked.
      mesh: devices to compute on.
      openers: open sets of real images, as far as they are there: 'reference'
        to compare with; 'originals' of the images, with which rFID compares,
        and all else where there is no reference; 'validation' for FDr, by
        default the originals.
      image_size: of the images.
      convention: one of `set_features.CONVENTIONS`.
    """
    self._plan, self._mesh, self._convention = plan, mesh, convention
    # Networks without weights see patches of up to 16 pixels, whosever images
    # these are, so that a run and a folder of its images get the same number.
    patches = {'patch_size': math.gcd(16, *sizes.pair(image_size))}
    self._distances = {
      name: pretrained.load_perceptual(spec)
      for name, spec in plan.distances.items()
    }
    self._networks = [
      set_features.load(
        spec,
        convention,
        **(patches if spec in pretrained.BUILTIN else {}),
      )
      for spec in plan.networks.values()
    ]
    reference, originals = openers.get('reference'), openers.get('originals')
    validation = openers.get('validation', originals)
    own = [m for m in plan.sets if m == 'rfid' or reference is None]
    others = [m for m in plan.sets if m not in own]
    self._references: list[tuple[Sequence[str], tuple[Any, Any]]] = []
    for names, opener in ((own, originals), (others, reference)):
      if not names:
        continue
      wanted = self._set_measurement(names).wanted
      opened = opener(wanted) if opener else None
      further = None
      if set_scores.RATIO in names and validation:
        further = validation(wanted)
      self._references.append((names, (opened, further)))
    self.start()

  def start(self) -> None:
    """Forgets all images, and measures others with the same references."""
    self._paired = None
    if self._plan.paired or self._distances:
      self._paired = paired.PairedScores(
        self._plan.paired,
        self._distances,
        self._mesh,
        random=[
          name
          for name, spec in self._plan.distances.items()
          if pretrained.RANDOM in spec.split(':')
        ],
      )
    self._sets = [
      (self._set_measurement(names), against)
      for names, against in self._references
    ]

  def add(self, batch: Mapping[str, Any]) -> None:
    """Adds a batch.

    Args:
      batch: 'image' uint8 [b, h, w, 3], 'mask' bool [b], and 'original' as
        'image' where the plan compares with originals: this process's share as
        numpy arrays, or arrays split over the mesh.
    """
    if self._paired is not None:
      placed = dict(batch)
      if not isinstance(batch['image'], jax.Array):
        placed = sharding.put_batch(placed, self._mesh)
      self._paired.add(placed)
    for measurement, _ in self._sets:
      measurement.add(batch)

  def finish(self) -> list[paired.Measured]:
    """Returns (metric, value, its part of the protocol)."""
    found = self._paired.finish() if self._paired is not None else []
    for measurement, against in self._sets:
      found += measurement.finish(*against)
    return found

  def _set_measurement(self, names: Sequence[str]) -> set_scores.SetMeasurement:
    return set_scores.SetMeasurement(
      self._networks, names, self._mesh, self._convention
    )


class Reconstructing:
  """A tokenizer's reconstructions on all devices of a mesh, as uint8."""

  def __init__(
    self,
    tokenizer: inference.ImageTokenizer,
    mesh: Mesh,
    *,
    with_codes: bool,
    health: transport_health.Health | None = None,
  ):
    """Places the parameters.

    Args:
      tokenizer: what reconstructs.
      mesh: devices that share a batch.
      with_codes: whether to count codes too.
      health: measures the transport too.
    """
    self._mesh, self._with_codes, self._health = mesh, with_codes, health
    self._model: Any = tokenizer.model
    everywhere = sharding.replicated(mesh)
    parts = {
      'tokenizer': tokenizer.params,
      'health': health.params if health else {},
    }
    self._params = jax.device_put(jax.tree.map(np.asarray, parts), everywhere)
    self._compute = jax.jit(
      self._reconstruct,
      out_shardings=(sharding.batch_sharding(mesh), everywhere),
    )
    self._gather = jax.jit(lambda x: x, out_shardings=everywhere)

  def __call__(
    self, batch: Mapping[str, np.ndarray]
  ) -> tuple[dict[str, Array], dict[str, Any]]:
    """Reconstructs a batch.

    Args:
      batch: 'image' and 'mask', this process's share.

    Returns:
      'image', 'original' and 'mask', split over the mesh; and what
      `codes.CodeStatistics.add` takes, of all processes together.
    """
    placed = sharding.put_batch(
      {name: batch[name] for name in ('image', 'mask')}, self._mesh
    )
    with jax.set_mesh(self._mesh):
      made, counted = self._compute(self._params, placed)
    return {
      'image': made,
      'original': placed['image'],
      'mask': placed['mask'],
    }, counted

  def gather(self, batch: Mapping[str, Array]) -> np.ndarray:
    """The images of a batch of all processes, without padding."""
    with jax.set_mesh(self._mesh):
      whole = self._gather({'image': batch['image'], 'mask': batch['mask']})
    return np.asarray(whole['image'])[np.asarray(whole['mask'])]

  def _reconstruct(
    self, params: PyTree, batch: dict[str, Array]
  ) -> tuple[Array, dict[str, Any]]:
    images = pixels.to_float(batch['image'])
    output = self._model.apply({'params': params['tokenizer']}, images)
    made = pixels.to_uint8(output.reconstruction, 'round')
    found: dict[str, Any] = {'mask': batch['mask'], 'counted': {}, 'health': {}}
    if self._with_codes:
      found['counted'] = codes.count_codes(output, batch['mask'])
    if self._health is not None:
      found['health'] = self._health(params['health'], images, output)
    return made, found
