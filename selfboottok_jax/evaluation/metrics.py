"""Names of metrics as users give them, and what each of them needs.

A name may go on as NAME:SOURCE, where the weights of its network are not those
that are published, as lpips_squeeze:FILE or fd_mobilenet_v2:FILE.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

from selfboottok_jax import errors, pretrained
from selfboottok_jax.evaluation import (
  codes,
  scores,
  set_scores,
  transport_health,
)

LPIPS = tuple(n for n in pretrained.PERCEPTUALS if n.startswith('lpips_'))
_DISTANCE, _FD = 'distance_', set_scores.DISTANCE
# Several metrics by one name; `lpips` is those whose weights are at hand.
ALIASES: dict[str, tuple[str, ...]] = {
  'lpips': LPIPS,
  'prec_recall': set_scores.NEIGHBOURS,
}
# Decoded Gaussian codes in place of a generator's samples.
BASELINE = 'gaussian_codes'
_INCEPTION = 'inception'
# Networks of a Frechet distance by default, the first whose weights are here.
_PREFERRED = ('dinov2_l', 'dinov2_b', 'mobilenet_v2')
_FALLBACK = 'hog'


@dataclasses.dataclass(frozen=True)
class Plan:
  """The metrics to measure, by what they need.

  Attributes:
    paired: scores of `scores.SCORES`, of images and their originals.
    distances: perceptual distances, the same: metric to the network's spec.
    codes: statistics of a tokenizer's codes.
    sets: scores of sets of images.
    networks: feature networks that these read: name to spec.
    has_baseline: whether decoded Gaussian codes are scored beside samples.
  """

  paired: tuple[str, ...] = ()
  distances: Mapping[str, str] = dataclasses.field(default_factory=dict)
  codes: tuple[str, ...] = ()
  sets: tuple[str, ...] = ()
  networks: Mapping[str, str] = dataclasses.field(default_factory=dict)
  has_baseline: bool = False

  def check(
    self,
    what: str,
    *,
    has_pairs: bool = False,
    has_codes: bool = False,
    has_reference: bool = False,
    has_validation: bool = False,
    samples: bool = False,
  ) -> None:
    """Raises ConfigError for metrics that nothing given allows.

    Args:
      what: what is measured, as '--samples=x.npz'.
      has_pairs: whether images have originals.
      has_codes: whether there is a tokenizer that makes codes.
      has_reference: whether a reference set was given; originals are one too.
      has_validation: whether further real images were given.
      samples: whether a generator makes the images.
    """
    rules: list[tuple[Sequence[str], bool, str]] = [
      (
        (*self.paired, *self.distances),
        has_pairs,
        'compares images with their originals; wanted a tokenizer as '
        '--workdir, or --samples with --pairs',
      ),
      (
        self.codes,
        has_codes,
        "is about a tokenizer's codes; wanted a tokenizer as --workdir",
      ),
      (
        [m for m in self.sets if m == 'rfid'],
        has_pairs,
        'compares reconstructions with their originals; wanted a tokenizer as '
        '--workdir, or --samples with --pairs; or the metric fid',
      ),
      (
        [m for m in self.sets if m == 'fid'],
        has_reference,
        'compares with a reference; wanted --reference=PHOTOS or an .npz file, '
        'or for reconstructions and their originals the metric rfid',
      ),
      (
        [m for m in self.sets if m not in ('is', 'rfid', 'fid')],
        has_reference or has_pairs,
        'compares with a reference; wanted --reference=PHOTOS or an .npz file',
      ),
      (
        [m for m in self.sets if m == set_scores.RATIO],
        has_validation,
        'divides by the distance of real images from the reference; wanted '
        '--validation=PHOTOS, which are not those of --reference',
      ),
      (
        [BASELINE] if self.has_baseline else [],
        samples,
        "stands beside a generator's samples; wanted a generator as --workdir",
      ),
    ]
    for names, is_met, wanted in rules:
      if names and not is_met:
        raise errors.ConfigError(
          f'--metrics: {", ".join(names)} of {what} {wanted}'
        )


def parse(
  given: Sequence[str], sources: Mapping[str, str] | None = None
) -> Plan:
  """Sorts metrics by what they need.

  Args:
    given: NAME or NAME:SOURCE.
    sources: specs of networks, by name, where the metric names no source.

  Raises:
    ConfigError: none, an unknown name, a source of a metric that reads no
      network, or two sources of one network.
  """
  paired: dict[str, None] = {}
  distances: dict[str, str] = {}
  of_codes: dict[str, None] = {}
  sets: dict[str, None] = {}
  networks: dict[str, str] = {}
  baseline = False
  known = sources or {}
  for text in _expand(given, known):
    name, _, source = text.partition(':')
    if name in pretrained.PERCEPTUALS and name in LPIPS:
      _add(distances, name, name, source)
    elif name.removeprefix(_DISTANCE) in _feature_distances(name):
      _add(distances, name, name.removeprefix(_DISTANCE), source)
    elif name in set_scores.OFFICIAL:
      sets[name] = None
      _add(networks, _INCEPTION, _INCEPTION, source)
    elif name.startswith(_FD) and name.removeprefix(_FD) in pretrained.NETWORKS:
      sets[name] = None
      network = name.removeprefix(_FD)
      _add(networks, network, network, source)
    elif source:
      _check_name(name, text)
      raise errors.ConfigError(
        f'--metrics: {name} reads no network of its own, got {text}; write '
        f'{name}'
      )
    elif name in scores.SCORES:
      paired[name] = None
    elif name in codes.METRICS:
      of_codes[name] = None
    elif name in (*set_scores.NEIGHBOURS, set_scores.RATIO):
      sets[name] = None
    elif name == BASELINE:
      baseline = True
    else:
      _check_name(name, text)
  if set_scores.RATIO in sets and len(networks) < 2:
    raise errors.ConfigError(
      f'--metrics: {set_scores.RATIO} averages over two networks or more; add '
      'fd_NETWORK for each, as fdr,fd_dinov2_b,fd_siglip2_b'
    )
  if sets and not networks:
    networks[_INCEPTION] = _INCEPTION
  for specs in (distances, networks):
    specs |= {key: known.get(spec, spec) for key, spec in specs.items()}
  if baseline and not sets:
    raise errors.ConfigError(
      f'--metrics={BASELINE} alone; wanted what it stands beside, as fid or '
      'fd_hog'
    )
  return Plan(
    tuple(paired), distances, tuple(of_codes), tuple(sets), networks, baseline
  )


def defaults(
  sources: Mapping[str, str],
  *,
  has_pairs: bool,
  has_codes: bool,
  has_reference: bool,
  samples: bool,
) -> list[str]:
  """Chooses metrics that what was given and the weights at hand allow.

  The arguments are those of `parse` and of `Plan.check`.
  """
  chosen: list[str] = []
  if has_pairs:
    chosen += [*scores.SCORES, *_at_hand(LPIPS, sources)]
  if has_codes:
    chosen += [m for m in codes.METRICS if m != transport_health.METRIC]
  official = _at_hand([_INCEPTION], sources)
  if official and has_pairs:
    chosen.append('rfid')
  if official and has_reference:
    chosen += ['fid', 'sfid', 'is', *set_scores.NEIGHBOURS]
  elif official and not has_pairs:
    chosen.append('is')
  elif not official and (has_pairs or has_reference):
    networks = _at_hand(_PREFERRED, sources)
    chosen.append(f'{_FD}{(*networks, _FALLBACK)[0]}')
    if samples:
      chosen.append(BASELINE)
  return chosen


def _expand(given: Sequence[str], sources: Mapping[str, str]) -> list[str]:
  """Replaces aliases by what they stand for; ConfigError for no metric."""
  found: list[str] = []
  for text in given:
    names = ALIASES.get(text, (text,))
    if text == 'lpips':
      # Without any of them the first one's error says what to fetch.
      names = _at_hand(names, sources) or names[:1]
    found += names
  if not [text for text in found if text]:
    raise errors.ConfigError('--metrics= is empty; wanted some, as psnr,ssim')
  return found


def _at_hand(
  names: Sequence[str], sources: Mapping[str, str]
) -> tuple[str, ...]:
  """Networks whose weights are on this machine."""
  return tuple(
    name for name in names if pretrained.is_at_hand(sources.get(name, name))
  )


def _feature_distances(name: str) -> tuple[str, ...]:
  """Networks of perceptual distances other than LPIPS, if a name says one."""
  if not name.startswith(_DISTANCE):
    return ()
  return tuple(n for n in pretrained.PERCEPTUALS if n not in LPIPS)


def _add(specs: dict[str, str], key: str, network: str, source: str) -> None:
  """Notes a network; ConfigError if it has another source already."""
  spec = f'{network}:{source}' if source else network
  before = specs.get(key, network)
  if network not in (before, spec) and before != spec:
    raise errors.ConfigError(
      f'--metrics names two sources of {network}, {before} and {spec}; wanted '
      'one'
    )
  specs[key] = spec if source else before


def _check_name(name: str, given: str) -> None:
  """Raises ConfigError, with advice, unless there is such a metric."""
  known = [
    *scores.SCORES,
    *LPIPS,
    *(f'{_DISTANCE}{n}' for n in _feature_distances(_DISTANCE)),
    *codes.METRICS,
    *set_scores.OFFICIAL,
    *set_scores.NEIGHBOURS,
    set_scores.RATIO,
    BASELINE,
    *ALIASES,
    *(f'{_FD}{network}' for network in pretrained.NETWORKS),
  ]
  if name in known:
    return
  close = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
  shown = close or [*known[: known.index(f'{_FD}hog')], f'{_FD}NETWORK']
  raise errors.ConfigError(
    f'--metrics: {given!r} is no metric; wanted '
    f'{"one of " if len(shown) > 1 else ""}{", ".join(shown)}'
  )
