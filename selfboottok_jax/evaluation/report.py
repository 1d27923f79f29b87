"""A page about a set of runs, as HTML in one file and as Markdown.

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
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import UInt8

from selfboottok_jax import errors, files, inference, trees
from selfboottok_jax.evaluation import (
  ablation,
  beside_paper,
  cost,
  evaluate,
  markdown,
  pictures,
  published,
  score_tables,
  tables,
)
from selfboottok_jax.evaluation import comparisons as comparisons_lib
from selfboottok_jax.evaluation import curves as curves_lib
from selfboottok_jax.evaluation import scores as scores_lib

if TYPE_CHECKING:
  import jinja2

# Metrics compared with trivial predictors; more is better for each of them.
BASELINED = ('val/psnr', 'val/ssim')
_PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'ott-jax', 'grain')
_SHOWN = 8  # Pictures of a row.


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
class Samples:
  """Images that a generator made by class name, equally many of each class."""

  run: str
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
    decoders: by generator, the run that decodes for it.
    stages: (label, PSNR in dB) of trainings of which each continues the one
      before it, in their order.
    comparisons: reconstructions of the same images by several runs.
    samples: generated images.
    scores: measured numbers.
    ablations: tables of launch.ablate, by the name of its folder.
    costs: the cost card of each run.
    notes: sentences for the reader.
    has_paper: whether to show the paper's tables beside the runs.
  """

  title: str
  created: str = ''
  environment: Mapping[str, object] = dataclasses.field(default_factory=dict)
  configs: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  runs: Sequence[Run] = ()
  decoders: Mapping[str, str] = dataclasses.field(default_factory=dict)
  stages: Sequence[tuple[str, float | int]] = ()
  comparisons: Sequence[comparisons_lib.Comparison] = ()
  samples: Sequence[Samples] = ()
  scores: Sequence[scores_lib.Score] = ()
  ablations: Sequence[tuple[str, Sequence[ablation.Filled]]] = ()
  costs: Mapping[str, cost.Card] = dataclasses.field(default_factory=dict)
  notes: Sequence[str] = ()
  has_paper: bool = False

  def __post_init__(self) -> None:
    """Refuses runs with equal names."""
    comparisons_lib.need_distinct(
      [run.name for run in self.runs], 'Runs of a report'
    )


def draw_samples(
  run: str,
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
    run,
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
  """Writes report.html, and report.md with the files that it shows.

  The page holds its own copies of the pictures, so it can be sent alone. It
  says where a later stage reconstructs worse than an earlier one and where a
  run does not beat trivial baselines.

  Returns:
    The path of report.html.

  Raises:
    UserError: metrics that cannot be read.
  """
  directory = files.as_path(directory)
  contents = _contents(report)
  page, text = render(report, contents), _render_markdown(report, contents)
  for index, comparison in enumerate(report.comparisons):
    rows = {}
    for row in comparison.rows:
      psnr = '' if row.psnr is None else f'\n{row.psnr:.2f} dB'
      rows[row.label + psnr] = row.images[:_SHOWN]
      if (difference := comparison.differences(row)) is not None:
        rows[f'{row.label}\ndifference'] = difference[:_SHOWN]
    image = pictures.comparison(rows)
    pictures.save_png(directory / _numbered('comparison', index), image)
  for index, samples in enumerate(report.samples):
    image = pictures.comparison(samples.classes)
    pictures.save_png(directory / _numbered('samples', index), image)
  for run in contents['curves']:
    for panel in run.panels:
      files.write_atomically(directory / panel.file, panel.svg)
  files.write_atomically(directory / 'report.md', text.encode())
  return files.write_atomically(directory / 'report.html', page.encode())


def render(report: Report, contents: Mapping[str, Any] | None = None) -> str:
  """Renders the page as HTML."""
  return _template('report.html').render(
    contents or _contents(report), report=report
  )


def _render_markdown(report: Report, contents: Mapping[str, Any]) -> str:
  text = _template('report.md').render(contents, report=report)
  return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'


def _numbered(name: str, index: int) -> str:
  return f'{name}-{index + 1}.png' if index else f'{name}.png'


def _contents(report: Report) -> dict[str, Any]:
  """Computes what both templates show, besides the report itself."""
  check_dependencies()
  metrics = {
    run.name: curves_lib.read_metrics(run.metrics)
    for run in report.runs
    if run.metrics is not None
  }
  tokenizers = {
    name: report.configs[report.decoders.get(name, name)]
    for name in report.configs
  }
  return {
    'regressions': regressions(report.stages),
    'unbeaten': [
      sentence
      for name, of_run in metrics.items()
      for sentence in unbeaten_baselines(name, of_run)
    ],
    'workdirs': {run.name: run.workdir for run in report.runs},
    'tasks': {run.name: run.task for run in report.runs},
    'gain': comparisons_lib.GAIN,
    'shown': _SHOWN,
    'scores': score_tables.arrange(report.scores),
    'curves': curves_of_runs(metrics),
    'most_points': curves_lib.MOST_POINTS,
    'cost_notes': _notes_on_costs(report.costs, metrics),
    'paper': beside_paper.show(tokenizers, report.scores)
    if report.has_paper
    else [],
    'deviations': _deviations(report.configs) if report.has_paper else [],
    'configs': {
      name: trees.flatten(tree).items() for name, tree in report.configs.items()
    },
  }


@functools.cache
def _template(name: str) -> 'jinja2.Template':
  import jinja2

  folder = importlib.resources.files(__package__) / 'templates'
  environment = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda file: (folder / file).read_text()),
    autoescape=name.endswith('.html'),
    # Markdown has HTML in it, and tables.
    finalize=markdown.cell if name.endswith('.md') else None,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {
    'number': tables.number,
    'duration': tables.duration,
    'kind': cost.kind,
    'breakable': _breakable,
    'png': lambda image: _data_url('image/png', pictures.png_bytes(image)),
    'svg': lambda data: _data_url('image/svg+xml', data),
    'numbered': _numbered,
  }
  return environment.get_template(name)


@dataclasses.dataclass(frozen=True)
class Panel:
  """A curve: its metric, its picture, and the file of it beside report.md."""

  metric: str
  svg: bytes
  file: str


@dataclasses.dataclass(frozen=True)
class RunCurves:
  """The curves of a run, or those of all runs together.

  Attributes:
    run: its name, '' for all together.
    groups: (heading, curves); the first group has no heading and is not folded.
    baselines: names of the trivial predictors that are drawn.
  """

  run: str
  groups: Sequence[tuple[str, Sequence[Panel]]]
  baselines: Sequence[str]

  @property
  def panels(self) -> list[Panel]:
    """Returns the curves of all groups."""
    return [panel for _, panels in self.groups for panel in panels]


def curves_of_runs(
  metrics: Mapping[str, curves_lib.Metrics],
) -> list[RunCurves]:
  """Draws curves that several runs have together, then those of each run."""
  shared = {
    name
    for name in (key for m in metrics.values() for key in curves_lib.panels(m))
    if name.startswith('val/') and sum(name in m for m in metrics.values()) > 1
  }
  merged = {key: s for m in metrics.values() for key, s in m.items()}
  together = [name for name in curves_lib.panels(merged) if name in shared]
  drawn = [_curves('', 'curves/all', metrics, together)] if together else []
  return drawn + [
    _curves(
      run,
      f'curves/run{index}',
      {run: m},
      [name for name in curves_lib.panels(m) if name not in shared],
    )
    for index, (run, m) in enumerate(metrics.items(), 1)
  ]


def _curves(
  run: str,
  folder: str,
  metrics: Mapping[str, curves_lib.Metrics],
  names: Sequence[str],
) -> RunCurves:
  groups: dict[str, list[Panel]] = {'': []}
  for name in names:
    file = f'{folder}-{re.sub(r"[^a-zA-Z0-9]+", "_", name)}.svg'
    svg = curves_lib.svg_bytes(curves_lib.draw(name, metrics))
    groups.setdefault(curves_lib.group(name), []).append(Panel(name, svg, file))
  baselines = {
    label
    for m in metrics.values()
    for name in names
    for label in curves_lib.baselines(name, m)
  }
  return RunCurves(run, list(groups.items()), sorted(baselines))


def _deviations(
  configs: Mapping[str, Mapping[str, Any]],
) -> list[tuple[published.Deviation, str]]:
  """Lists the choices that the paper leaves open, with each run's value."""
  flat = {name: trees.flatten(config) for name, config in configs.items()}
  found = []
  for deviation in published.deviations():
    values: dict[str, list[str]] = {}
    for name, config in flat.items():
      if deviation.field in config:
        values.setdefault(str(config[deviation.field]), []).append(name)
    told = [
      f'{value} ({", ".join(names)})' if len(values) > 1 else value
      for value, names in values.items()
    ]
    found.append((deviation, '; '.join(told)))
  return found


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


def _breakable(text: str) -> str:
  """Marks where a name may be broken, in HTML."""
  import markupsafe

  return markupsafe.Markup(
    re.sub('([_/])', r'\1<wbr>', str(markupsafe.escape(text)))
  )


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
