"""One self-contained HTML page about a set of runs."""

import base64
import functools
import importlib.resources
import os
import pathlib
from collections.abc import Mapping

import jinja2
import numpy as np
from jaxtyping import UInt8
from matplotlib import figure as figures

from selfboottok_jax import files
from selfboottok_jax.evaluation import (
  content,
  cost,
  curves,
  findings,
  history,
  pictures,
  tables,
)

_SAMPLE_COLUMNS = 10


def write_report(
  report: content.Report, directory: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes report.html, and comparison.png and samples.png beside it.

  The page holds its own copies of the pictures, so it can be sent alone. It
  says where a later stage reconstructs worse than an earlier one (by the PSNR
  of the comparison's rows) and where a run does not beat trivial baselines.

  Returns:
    The path of report.html.

  Raises:
    UserError: metrics that cannot be read, or rows of unequal shapes.
  """
  directory = pathlib.Path(directory)
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


def render(report: content.Report) -> str:
  """The page as text."""
  metrics = {
    run.name: history.read_metrics(run.metrics)
    for run in report.runs
    if run.metrics is not None
  }
  rows = report.comparison.rows if report.comparison else ()
  stages = [(row.label, row.psnr) for row in rows if row.psnr is not None]
  return _template().render(
    report=report,
    stages=stages,
    regressions=findings.regressions(stages),
    unbeaten=[
      sentence
      for name, of_run in metrics.items()
      for sentence in findings.unbeaten_baselines(name, of_run)
    ],
    reconstructions=[
      (row.label, row.psnr, _png_url(pictures.strip(row.images)))
      for row in rows
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
    most_points=curves.MOST_POINTS,
    components=_component_rows(report.costs),
    cost_notes=_notes_on_costs(report.costs, metrics),
    configs={name: _flat(tree) for name, tree in report.configs.items()},
  )


@functools.cache
def _template() -> jinja2.Template:
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
  }
  source = importlib.resources.files(__package__) / 'report.html'
  return environment.from_string(source.read_text('utf-8'))


def _curve_figures(
  metrics: Mapping[str, history.Metrics],
) -> list[tuple[str, list[tuple[str, str]], list[str]]]:
  """(heading, [(metric, image)], baselines): all runs, then each of them."""
  shared = {
    name
    for name in (key for m in metrics.values() for key in curves.panels(m))
    if name.startswith('val/') and sum(name in m for m in metrics.values()) > 1
  }
  groups = [('', metrics, [n for n in _in_order(metrics) if n in shared])]
  groups += [(run, {run: m}, curves.panels(m)) for run, m in metrics.items()]
  return [
    (
      heading,
      [(name, _svg_url(curves.draw(name, runs))) for name in names],
      sorted(
        {
          label
          for m in runs.values()
          for name in names
          for label in history.baselines(name, m)
        }
      ),
    )
    for heading, runs, names in groups
    if names or heading
  ]


def _in_order(metrics: Mapping[str, history.Metrics]) -> list[str]:
  return curves.panels({k: s for m in metrics.values() for k, s in m.items()})


def _component_rows(costs: Mapping[str, cost.Card]) -> list[tuple[str, list]]:
  """Components as rows; for each run a row of its card, or None."""
  names = dict.fromkeys(r.component for c in costs.values() for r in c.rows)
  by_run = [{r.component: r for r in card.rows} for card in costs.values()]
  return [(name, [rows.get(name) for rows in by_run]) for name in names]


def _notes_on_costs(
  costs: Mapping[str, cost.Card], metrics: Mapping[str, history.Metrics]
) -> list[tuple[str, str]]:
  """What is known of a run's compiled step and of its speed."""
  notes = []
  for name, card in costs.items():
    known = cost.sentences(card)
    rates = metrics.get(name, {}).get('images_per_second')
    if rates is not None:
      # Of the phase whose operations were counted.
      values = rates.values[rates.steps > card.first_step]
      if values.size:
        rate = float(np.median(values))
        known.append(
          f'{tables.number(rate)} images/s while training (median), '
          f'{tables.number(rate * card.flops.model / 1e9)} GFLOP/s'
        )
    notes.append((name, '; '.join(known)))
  return [(name, note) for name, note in notes if note]


def _flat(tree: Mapping, prefix: str = '') -> list[tuple[str, object]]:
  """Nested mappings as (dotted.key, value) pairs."""
  pairs = []
  for key, value in tree.items():
    if isinstance(value, Mapping):
      pairs += _flat(value, f'{prefix}{key}.')
    else:
      pairs.append((f'{prefix}{key}', value))
  return pairs


def _png_url(image: UInt8[np.ndarray, 'h w 3']) -> str:
  return _data_url('image/png', pictures.png_bytes(image))


def _svg_url(figure: figures.Figure) -> str:
  return _data_url('image/svg+xml', curves.svg_bytes(figure))


def _data_url(kind: str, data: bytes) -> str:
  return f'data:{kind};base64,{base64.b64encode(data).decode()}'
