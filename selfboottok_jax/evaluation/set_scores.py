"""Scores of a set of images against a reference set, streamed.

Frechet distances (FID and rFID, sFID, FD on any features), the inception score,
precision and recall, and FDr. Each comes with its own part of the protocol.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from selfboottok_jax import errors
from selfboottok_jax.evaluation import (
  frechet,
  inception_score,
  precision_recall,
  references,
  set_features,
)
from selfboottok_jax.pretrained import contract, inception

POOL, SPATIAL, LOGITS = (
  set_features.POOL,
  set_features.SPATIAL,
  set_features.LOGITS,
)
# Metrics of the official Inception alone, with the features they read.
OFFICIAL = {'fid': POOL, 'rfid': POOL, 'sfid': SPATIAL, 'is': LOGITS}
NEIGHBOURS = ('precision', 'recall')
DISTANCE = 'fd_'
RATIO = 'fdr'
METRICS = (*OFFICIAL, *NEIGHBOURS, f'{DISTANCE}NETWORK', RATIO)
# What a convention does not define.
_LACKS = {
  'adm': (),
  'torch_fidelity': ('sfid',),
  'pytorch_fid': ('sfid', 'is'),
}


_AT_EQUAL_COUNTS = 'compare at equal counts alone'


class SetMeasurement:
  """Measures a set of images that comes in batches."""

  def __init__(
    self,
    networks: Sequence[str | set_features.SetNetwork | contract.FeatureNetwork],
    metrics: Sequence[str],
    mesh: Mesh,
    convention: str = 'adm',
  ):
    """Loads the networks; no image is seen yet.

    Args:
      networks: specs, or networks with their parameters. Precision and recall
        are of the official Inception if it is among them, else of the first.
      metrics: names of METRICS; with fd_NETWORK for a network's name.
      mesh: devices to compute on.
      convention: one of `set_features.CONVENTIONS`: the resize of Inception,
        and the parts of the inception score.

    Raises:
      UserError: an unknown metric, one that needs another network, or what
        `set_features.load` raises.
    """
    errors.require_choice('convention', convention, set_features.CONVENTIONS)
    self.networks = set_features.as_networks(networks, convention)
    self.metrics, self.convention = tuple(dict.fromkeys(metrics)), convention
    official = [n for n in self.networks if n.is_official]
    self._inception = official[0] if official else None
    self._neighbours = (official or self.networks)[0]
    self._check()
    needed = {m: self._keys(m) for m in self.metrics}
    one_by_one = ('is', *NEIGHBOURS)

    def keys(kept: bool) -> tuple[str, ...]:
      found = [
        k for m, ks in needed.items() if (m in one_by_one) == kept for k in ks
      ]
      return tuple(dict.fromkeys(found))

    self.wanted = set_features.Wanted(
      self.networks, moments=keys(False), kept=keys(True), mesh=mesh
    )
    self._features = set_features.SetFeatures(self.wanted)

  def add(self, batch: Mapping[str, Any]) -> None:
    """Adds a batch; see `set_features.SetFeatures.add`."""
    self._features.add(batch)

  @property
  def count(self) -> int:
    """Images so far; the last batch counts after `finish`."""
    return self._features.count

  def finish(
    self,
    reference: references.Reference | None = None,
    validation: references.Reference | None = None,
  ) -> list[tuple[str, float, dict[str, Any]]]:
    """Computes the scores of the images that were added.

    Args:
      reference: opened with `wanted`; the inception score alone needs none.
      validation: real images that the reference has not, for FDr alone; opened
        with `wanted` too.

    Returns:
      (metric, value, its part of the protocol) for each of the metrics.

    Raises:
      UserError: too few images, or a reference that is missing or unfit.
    """
    self._features.finish()
    if self.count < references.LEAST_IMAGES:
      raise errors.DataError(
        f'{self.count} images to score; wanted {references.LEAST_IMAGES} or '
        'more, and thousands for scores that mean something'
      )
    if reference is None and self.metrics != ('is',):
      raise errors.ConfigError(
        f'{", ".join(self.metrics)} without a reference; wanted photographs or '
        'an .npz file to compare with'
      )
    found: dict[str, tuple[float, dict[str, Any]]] = {}
    if 'is' in self.metrics:
      found['is'] = self._inception_score()
    if reference is not None:
      if set(self.metrics) & set(NEIGHBOURS):
        found |= self._precision_recall(reference)
      if RATIO in self.metrics:
        found[RATIO] = self._ratio(reference, validation)
      for metric in self.metrics:
        if metric not in found:
          found[metric] = self._distance(self._keys(metric)[0], reference)
    return [(metric, *found[metric]) for metric in self.metrics]

  def _check(self) -> None:
    """Raises ConfigError for metrics that the networks cannot give."""
    names = [network.name for network in self.networks]
    errors.require(bool(self.metrics), 'metrics', '', 'one or more')
    for network in self.networks:
      resize = getattr(network.network, 'resize', None)
      wanted = set_features.CONVENTIONS[self.convention]
      if network.name == 'inception' and resize != wanted:
        raise errors.ConfigError(
          f'inception with resize {resize} for the convention '
          f'{self.convention}, whose resize is {wanted}; load it for that'
        )
    for metric in self.metrics:
      if metric in _LACKS[self.convention]:
        raise errors.ConfigError(
          f'{metric} is not defined by the convention {self.convention}; use '
          "'adm', or leave it out"
        )
      if metric in OFFICIAL:
        if self._inception is None:
          raise errors.ConfigError(
            f'{metric} is a number of Inception with the weights of 2015-12-05 '
            f'(SHA-256 {inception.DIGEST}...), and the networks are '
            f'{", ".join(names)} with others; see docs/networks.md for the file'
            f', or measure {DISTANCE}{names[0]}'
          )
      elif metric == RATIO:
        errors.require(
          len(names) > 1,
          RATIO,
          ', '.join(names),
          'two networks or more, whose ratios it averages',
        )
      elif metric not in NEIGHBOURS:
        known = [f'{DISTANCE}{name}' for name in names]
        choices = (*OFFICIAL, *NEIGHBOURS, *known, RATIO)
        errors.require_choice('metrics', metric, choices)

  def _keys(self, metric: str) -> tuple[str, ...]:
    """Features that a metric reads."""
    if metric in OFFICIAL:
      assert self._inception is not None
      return (self._inception.key(OFFICIAL[metric]),)
    if metric in NEIGHBOURS:
      return (self._neighbours.key(POOL),)
    if metric == RATIO:
      return tuple(network.key(POOL) for network in self.networks)
    return (f'{metric.removeprefix(DISTANCE)}/{POOL}',)

  def _distance(
    self, key: str, reference: references.Reference
  ) -> tuple[float, dict[str, Any]]:
    made = self._features.gaussian(key)
    value = frechet.frechet_distance(made, reference.gaussian(key))
    network = self.wanted.network_of(key)
    return value, self._protocol(network, reference, key)

  def _inception_score(self) -> tuple[float, dict[str, Any]]:
    assert self._inception is not None
    logits = self._features.features(self._inception.key(LOGITS))
    logits = logits[inception_score.shuffle(len(logits))]
    protocol = self._protocol(self._inception)
    part = inception_score.PART
    if self.convention == 'torch_fidelity':
      value, deviation = inception_score.score_in_parts(logits)
      part = len(logits) // inception_score.PARTS
      protocol |= {'splits': '10, shuffled', 'deviation': deviation}
    else:
      value = inception_score.score_in_parts_of(logits)
      protocol['splits'] = 'of 5000, shuffled'
    part = min(part, len(logits))
    if part < inception_score.PART:
      _warn(
        protocol,
        [f'parts of {part} images bias it downwards: {_AT_EQUAL_COUNTS}'],
      )
    return value, protocol

  def _precision_recall(
    self, reference: references.Reference
  ) -> dict[str, tuple[float, dict[str, Any]]]:
    key = self._neighbours.key(POOL)
    if key not in reference.features:
      raise errors.UserError(
        f'the reference {reference.name} was opened without the features '
        f'{key}; open it for precision and recall'
      )
    real, made = reference.features[key], self._features.features(key)
    pair = precision_recall.precision_recall(real, made)
    protocol = self._protocol(self._neighbours, reference) | {
      'neighbours': precision_recall.NEIGHBOURS,
      'reference_count': len(real),
    }
    return {
      metric: (value, dict(protocol))
      for metric, value in zip(NEIGHBOURS, pair, strict=True)
    }

  def _ratio(
    self,
    reference: references.Reference,
    validation: references.Reference | None,
  ) -> tuple[float, dict[str, Any]]:
    """FDr: distances in units of those of real images, averaged."""
    if validation is None or validation.fingerprint == reference.fingerprint:
      raise errors.ConfigError(
        f'{RATIO} divides by the distance of real validation images from the '
        f'reference {reference.name}, and '
        + ('none were' if validation is None else 'the reference itself was')
        + ' given for them; wanted two sets: training images as the reference, '
        'other real images for validation'
      )
    ratios, parts = [], []
    for network in self.networks:
      key = network.key(POOL)
      real = frechet.frechet_distance(
        validation.gaussian(key), reference.gaussian(key)
      )
      # Below this it is round-off.
      if real < 1e-9 * np.trace(reference.gaussian(key).covariance):
        raise errors.DataError(
          f'the images of {validation.name} are those of {reference.name}; '
          f'wanted others, else {RATIO} divides by 0'
        )
      distance, part = self._distance(key, reference)
      ratios.append(distance / real)
      parts.append(part)
    protocol = dict(parts[0])
    for name in ('network', 'weights', 'resize'):
      protocol[name] = ', '.join(part.get(name, '-') for part in parts)
    warnings = [part['warning'] for part in parts if 'warning' in part]
    if validation.count != self.count:
      warnings.append(
        f'{validation.count} validation images against {self.count}: unequal '
        'counts have unequal bias'
      )
    protocol |= {
      'validation': validation.name,
      'validation_fingerprint': validation.fingerprint[:12],
      'validation_count': validation.count,
      'ratios': ', '.join(f'{ratio:.6g}' for ratio in ratios),
    }
    _warn(protocol, warnings)
    return float(np.mean(ratios)), protocol

  def _protocol(
    self,
    network: set_features.SetNetwork,
    reference: references.Reference | None = None,
    key: str = '',
  ) -> dict[str, Any]:
    """Collects how a score was measured, for its protocol.

    `key` names the features that a Frechet distance compares, '' for others.
    """
    protocol: dict[str, Any] = {
      'backend': jax.default_backend(),
      **network.protocol,
      'count': self.count,
    }
    if network.name == 'inception':
      protocol['convention'] = self.convention
    warnings = []
    if network.is_random:
      warnings.append('random weights')
    if reference is not None:
      protocol |= reference.protocol
      if key:
        width = self.wanted.width(key)
        # A file may have statistics of other images than those beside them.
        reference_count = reference.gaussian(key).count
        if reference_count:
          protocol['reference_count'] = reference_count
        for what, count in (
          ('images', self.count),
          ('reference images', reference_count),
        ):
          if 0 < count <= width:
            warnings.append(
              f'{count} {what} for {width} features bias it upwards: '
              f'{_AT_EQUAL_COUNTS}'
            )
        if network.is_official and self.convention != 'pytorch_fid':
          warnings += reference.warnings
    _warn(protocol, warnings)
    return protocol


def _warn(protocol: dict[str, Any], warnings: Sequence[str]) -> None:
  """Adds warnings to a protocol, each once."""
  given = [protocol['warning']] if 'warning' in protocol else []
  if given or warnings:
    protocol['warning'] = '; '.join(dict.fromkeys([*given, *warnings]))
