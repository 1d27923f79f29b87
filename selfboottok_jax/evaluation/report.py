"""One self-contained HTML page about a set of runs.

jinja2 and matplotlib are imported by the functions that need them: the extra
`report` installs both.
"""

import base64
import dataclasses
import datetime
import functools
import importlib.resources
import importlib.util
import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import UInt8

from selfboottok_jax import errors, files, inference, trees
from selfboottok_jax.evaluation import cost, evaluate, pictures, tables
from selfboottok_jax.evaluation import curves as curves_lib
from selfboottok_jax.evaluation import scores as scores_lib
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import logging as logging_lib

if TYPE_CHECKING:
  import jinja2
  import matplotlib.figure

# Metrics compared with trivial predictors; more is better for each of them.
BASELINED = ('val/psnr', 'val/ssim')
_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'ott-jax', 'grain')
_SAMPLE_COLUMNS = 10


def check_dependencies() -> None:
  """Raises UserError if what draws the page is not installed."""
  missing = [
    name
    for name in ('jinja2', 'matplotlib')
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise errors.UserError(
      f'a report needs {" and ".join(missing)}, not installed here; wanted '
      "pip install 'selfboottok_jax[report]'"
    )


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run; `metrics` is its metrics.jsonl, None if it has none."""

  name: str
  workdir: str
  task: str
  steps: int
  seconds: float | int
  metrics: str | os.PathLike[str] | None = None


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """A row of the comparison; `psnr` in dB, None for the originals."""

  label: str
  images: UInt8[np.ndarray, 'm h w 3']
  psnr: float | int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The same images by row: originals, then stages in training order."""

  rows: Sequence[Reconstruction]
  protocol: str

  def __post_init__(self) -> None:
    """Refuses rows with equal labels, and rows without a protocol."""
    scores_lib.check_protocol(self.protocol, 'the reconstruction comparison')
    _need_distinct([row.label for row in self.rows], 'Rows of a comparison')


@dataclasses.dataclass(frozen=True)
class Samples:
  """Generated images by class name, equally many of each class."""

  classes: Mapping[str, UInt8[np.ndarray, '...']]
  protocol: str

  def __post_init__(self) -> None:
    """Refuses pictures without their protocol."""
    scores_lib.check_protocol(self.protocol, 'the samples')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """The contents of a page; everything but the title may be left out.

  Attributes:
    title: of the page.
    created: date and time, as text.
    environment: versions, devices and cores by name.
    configs: the configuration of each run, nested.
    runs: the trainings.
    comparison: reconstructions of the same images by several stages.
    samples: generated images.
    scores: measured numbers.
    costs: the cost card of each run.
    notes: sentences for the reader.
  """

  title: str
  created: str = ''
  environment: Mapping[str, object] = dataclasses.field(default_factory=dict)
  configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  runs: Sequence[Run] = ()
  comparison: Comparison | None = None
  samples: Samples | None = None
  scores: Sequence[scores_lib.Score] = ()
  costs: Mapping[str, cost.Card] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()

  def __post_init__(self) -> None:
    """Refuses runs with equal names."""
    _need_distinct([run.name for run in self.runs], 'Runs of a report')

  @property
  def stages(self) -> list[tuple[str, float | int]]:
    """(label, PSNR in dB) of the stages compared, in training order."""
    rows = self.comparison.rows if self.comparison else ()
    return [(row.label, row.psnr) for row in rows if row.psnr is not None]


def _need_distinct(names: Sequence[str], what: str) -> None:
  if len(set(names)) < len(names):
    raise errors.UserError(
      f'{what} need different names in one report; given {list(names)}.'
    )


def make_page(
  workdirs: Sequence[str],
  *,
  tokenizer: str = '',
  title: str = 'SelfBootTok runs',
  per_class: int = 8,
  seed: int = 1,
) -> Report:
  """Reads runs back, and samples from the generator among them.

  Args:
    workdirs: the runs; at most one of them a generator.
    tokenizer: workdir of the tokenizer that decodes for the generator.
    title: of the page.
    per_class: samples of each class.
    seed: of the samples.

  Raises:
    UserError: a folder that is no run, two generators, or a generator without
      a tokenizer.
  """
  names = list(dict.fromkeys(workdirs))
  configs = {name: checkpointing.read_config(name, '--runs') for name in names}
  generators = [n for n in names if configs[n]['task'] == 'generator']
  if len(generators) > 1:
    raise errors.ConfigError(
      f'--runs has {len(generators)} generators ({", ".join(generators)}), and '
      'a page shows the samples of one; wanted a page for each'
    )
  samples = None
  if generators:
    if not tokenizer:
      raise errors.ConfigError(
        f'--tokenizer not given; {generators[0]} is a generator, wanted the '
        'workdir of the tokenizer that decodes for it'
      )
    generator = inference.load_generator(generators[0], tokenizer=tokenizer)
    samples = draw_samples(
      generator, per_class, seed=seed, decoded_by=tokenizer
    )
  return Report(
    title=title,
    created=timestamp(),
    environment=environment(),
    configs=configs,
    runs=[read_run(name, name, '--runs') for name in names],
    samples=samples,
    scores=[score for name in names for score in evaluate.read_scores(name)],
    # Imported runs have no card.
    costs={
      name: cost.read(name)
      for name in names
      if files.exists(files.as_path(name) / cost.FILE)
    },
  )


def read_run(
  workdir: str | os.PathLike[str], name: str, flag: str = 'workdir'
) -> Run:
  """Reads a run for a page; errors name the flag that gave the workdir."""
  run = checkpointing.read_run(str(workdir), what=flag)
  path = files.as_path(workdir) / logging_lib.METRICS
  return Run(
    name,
    str(workdir),
    run.config['task'],
    run.step,
    logging_lib.seconds(path) if files.exists(path) else 0,
    path if files.exists(path) else None,
  )


def draw_samples(
  generator: inference.ImageGenerator,
  per_class: int,
  *,
  seed: int,
  decoded_by: str,
  most_classes: int = 10,
) -> Samples:
  """Samples every class, or `most_classes` spread evenly over all."""
  count = min(most_classes, generator.num_classes)
  chosen = np.arange(count) * generator.num_classes // count
  labels = np.tile(chosen.astype(np.int32), per_class)
  images = np.concatenate(
    list(evaluate.sample_batches(generator, labels, len(labels), seed=seed))
  )
  classes = {
    generator.class_names[label]: images[index::count]
    for index, label in enumerate(chosen)
  }
  return Samples(
    classes,
    f'{generator.sampling.describe()}; seed {seed}, step {generator.step}, EMA '
    f'weights, decoded by {decoded_by}; unselected',
  )


def environment() -> dict[str, object]:
  """Collects versions, devices and cores by name."""
  return {
    'Python': platform.python_version(),
    **{package: metadata.version(package) for package in _PACKAGES},
    'device': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    'CPU cores': os.cpu_count(),
  }


def timestamp() -> str:
  """Formats the current date and time in UTC, for `Report.created`."""
  return datetime.datetime.now(datetime.UTC).strftime('%d %B %Y %H:%M UTC')


def write_report(
  report: Report, directory: str | os.PathLike[str]
) -> files.Path:
  """Writes report.html, and comparison.png and samples.png beside it.

  The page holds its own copies of the pictures, so it can be sent alone. It
  says where a later stage reconstructs worse than an earlier one (by the PSNR
  of the comparison's rows) and where a run does not beat trivial baselines.

  Returns:
    The path of report.html.

  Raises:
    UserError: metrics that cannot be read, or rows of unequal shapes.
  """
  directory = files.as_path(directory)
  page = render(report)
  if report.comparison:
    image = pictures.comparison(
      {
        row.label + ('' if row.psnr is None else f'\n{row.psnr:.2f} dB'): (
          row.images
        )
        for row in report.comparison.rows
      }
    )
    pictures.save_png(directory / 'comparison.png', image)
  if report.samples:
    image = pictures.comparison(report.samples.classes)
    pictures.save_png(directory / 'samples.png', image)
  return files.write_atomically(directory / 'report.html', page.encode())


def render(report: Report) -> str:
  """Renders the page as HTML."""
  check_dependencies()
  metrics = {
    run.name: curves_lib.read_metrics(run.metrics)
    for run in report.runs
    if run.metrics is not None
  }
  return _template().render(
    report=report,
    stages=report.stages,
    regressions=regressions(report.stages),
    unbeaten=[
      sentence
      for name, of_run in metrics.items()
      for sentence in unbeaten_baselines(name, of_run)
    ],
    reconstructions=[
      (row.label, row.psnr, _png_url(pictures.strip(row.images)))
      for row in (report.comparison.rows if report.comparison else ())
    ],
    samples=[
      (
        name,
        _png_url(pictures.strip(images, min(len(images), _SAMPLE_COLUMNS))),
      )
      for name, images in (
        report.samples.classes.items() if report.samples else ()
      )
    ],
    curves=_curve_figures(metrics),
    most_points=curves_lib.MOST_POINTS,
    components=_component_rows(report.costs),
    cost_notes=_notes_on_costs(report.costs, metrics),
    configs={
      name: trees.flatten(tree).items() for name, tree in report.configs.items()
    },
  )


@functools.cache
def _template() -> 'jinja2.Template':
  import jinja2

  environment = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    'number': tables.number,
    'duration': tables.duration,
    'kind': cost.kind,
    'higher_is_better': scores_lib.higher_is_better,
    'in_words': scores_lib.in_words,
  }
  source = importlib.resources.files(__package__) / 'report.html'
  return environment.from_string(source.read_text('utf-8'))


def _curve_figures(
  metrics: Mapping[str, curves_lib.Metrics],
) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
  """Curves of all runs together, then of each run.

  Returns:
    (heading, [(metric, URL of its picture)], names of baselines) per group.
  """
  shared = {
    name
    for name in (key for m in metrics.values() for key in curves_lib.panels(m))
    if name.startswith('val/') and sum(name in m for m in metrics.values()) > 1
  }
  merged = {key: s for m in metrics.values() for key, s in m.items()}
  together = [name for name in curves_lib.panels(merged) if name in shared]
  groups = [('', metrics, together)]
  groups += [
    (run, {run: m}, curves_lib.panels(m)) for run, m in metrics.items()
  ]
  return [
    (
      heading,
      [(name, _svg_url(curves_lib.draw(name, runs))) for name in names],
      sorted(
        {
          label
          for m in runs.values()
          for name in names
          for label in curves_lib.baselines(name, m)
        }
      ),
    )
    for heading, runs, names in groups
    if names or heading
  ]


def _component_rows(
  costs: Mapping[str, cost.Card],
) -> list[tuple[str, list[cost.Row | None]]]:
  """(component, [its row in the card of each run, or None])."""
  names = dict.fromkeys(r.component for c in costs.values() for r in c.rows)
  by_run = [{r.component: r for r in card.rows} for card in costs.values()]
  return [(name, [rows.get(name) for rows in by_run]) for name in names]


def _notes_on_costs(
  costs: Mapping[str, cost.Card], metrics: Mapping[str, curves_lib.Metrics]
) -> list[tuple[str, str]]:
  """(run, sentences about its compiled step and its speed)."""
  notes = []
  for name, card in costs.items():
    known = cost.sentences(card)
    rates = metrics.get(name, {}).get('images_per_second')
    if rates is not None:
      # Only steps of the phase whose operations the card counts.
      values = rates.values[rates.steps > card.first_step]
      if values.size:
        rate = float(np.median(values))
        known.append(
          f'{tables.number(rate)} images/s while training (median), '
          f'{tables.number(rate * card.flops.model / 1e9)} GFLOP/s'
        )
    notes.append((name, '; '.join(known)))
  return [(name, note) for name, note in notes if note]


def _png_url(image: UInt8[np.ndarray, 'h w 3']) -> str:
  return _data_url('image/png', pictures.png_bytes(image))


def _svg_url(figure: 'matplotlib.figure.Figure') -> str:
  return _data_url('image/svg+xml', curves_lib.svg_bytes(figure))


def _data_url(kind: str, data: bytes) -> str:
  return f'data:{kind};base64,{base64.b64encode(data).decode()}'


def regressions(stages: Sequence[tuple[str, float | int]]) -> list[str]:
  """Names each stage that reconstructs worse than an earlier one.

  Args:
    stages: (label, PSNR in dB) in the order in which the stages were trained.

  Each stage is compared with the best one before it, so a stage that makes up
  for only half of a loss is named too. NaN counts as worse.
  """
  sentences = []
  best_label, best = '', -math.inf
  for label, psnr in stages:
    if best_label and not psnr >= best:
      later, earlier = _apart(psnr, best)
      sentences.append(
        f'{label} reconstructs worse than {best_label}: PSNR {later} dB '
        f'against {earlier} dB.'
      )
    elif not math.isnan(psnr):
      best_label, best = label, psnr
  return sentences


def unbeaten_baselines(run: str, metrics: curves_lib.Metrics) -> list[str]:
  """A sentence for each trivial baseline that a run's last score is not above.

  Baselines are logged beside their metric, see `curves.baselines`.
  """
  sentences = []
  for name in BASELINED:
    if name not in metrics:
      continue
    last = float(metrics[name].values[-1])
    for label, value in curves_lib.baselines(name, metrics).items():
      if not last > value:
        own, trivial = _apart(last, value)
        sentences.append(
          f'{run} does not beat the trivial baseline "{label}": {name} {own} '
          f'against {trivial}.'
        )
  return sentences


def _apart(a: float | int, b: float | int) -> tuple[str, str]:
  """Formats both numbers, with as many digits as distinguish them."""
  for digits in range(2, 7):
    pair = f'{a:.{digits}f}', f'{b:.{digits}f}'
    if pair[0] != pair[1] or a == b:
      return pair
  return f'{a}', f'{b}'
