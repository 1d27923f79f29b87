"""Curves of the numbers that runs logged.

Figures are built without pyplot, so nothing here is global or needs a screen.
"""

import io
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib import axes, ticker
from matplotlib import figure as figures
from matplotlib.backends import backend_agg

from selfboottok_jax import errors
from selfboottok_jax.evaluation import history

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MOST_POINTS = 400  # Of a drawn line; more are averaged.
_DASHES = ('--', ':', '-.')
_LOG_RANGE = 50  # Positive training terms spanning more get a log axis.
_LAST = ('learning_rate', 'images_per_second', 'data_wait')
_FIRST = ('loss', 'val/psnr', 'val/ssim')


def panels(metrics: history.Metrics) -> list[str]:
  """Names that get a panel: losses, then evaluation, then throughput.

  Baselines have none of their own; they are lines in their metric's panel.
  """
  drawn_elsewhere = {
    key
    for key in metrics
    if '_mean_' in key and key.split('_mean_')[0] in metrics
  }

  def rank(name: str) -> tuple[int, int]:
    if name in _FIRST:
      return 0, _FIRST.index(name)
    if name in _LAST:
      return 3, _LAST.index(name)
    return (1 if name.startswith('val/') else 2), 0

  return sorted(
    (key for key in metrics if key not in drawn_elsewhere), key=rank
  )


def thin(series: history.Series) -> history.Series:
  """Means of equal bins, at most 400 of them; short series stay as they are."""
  count = len(series.steps)
  if count <= MOST_POINTS:
    return series
  edges = np.linspace(0, count, MOST_POINTS + 1).astype(np.int64)
  sizes = np.diff(edges)
  steps = np.add.reduceat(series.steps, edges[:-1]) // sizes
  return history.Series(
    steps, np.add.reduceat(series.values, edges[:-1]) / sizes
  )


def draw(name: str, runs: Mapping[str, history.Metrics]) -> figures.Figure:
  """One metric over steps, a line a run, trivial baselines dashed.

  Args:
    name: a name that at least one of the runs logged.
    runs: run name -> its metrics; several runs get a legend.

  Raises:
    UserError: no run logged the name.
  """
  drawn = {run: m[name] for run, m in runs.items() if name in m}
  if not drawn:
    raise errors.UserError(
      f'No metric "{name}" in the runs {sorted(runs)}; logged are '
      f'{sorted({key for m in runs.values() for key in m})}.'
    )
  figure = figures.Figure(figsize=(3.5, 2.3), layout='constrained')
  axis = figure.add_subplot()
  labels = []
  colours = dict(zip(runs, COLOURS * len(runs), strict=False))
  for run, series in drawn.items():
    steps, values = thin(series)
    axis.plot(
      steps,
      np.where(np.isfinite(values), values, np.nan),
      color=colours[run],
      linewidth=1.4,
      marker='o' if len(steps) < 25 else '',
      markersize=2.5,
    )
    labels += [run] if len(runs) > 1 else []
  # Runs on the same images share their baselines: each is drawn once.
  levels = sorted(
    {pair for m in runs.values() for pair in history.baselines(name, m).items()}
  )
  lines = axis.get_lines()[: len(labels)]
  for index, (label, value) in enumerate(levels):
    style = _DASHES[index % len(_DASHES)]
    lines.append(
      axis.axhline(value, color='#666', linewidth=1, linestyle=style)
    )
    labels.append(f'{label} {value:.2f}')
  _style(axis, name, drawn)
  if labels:
    _legend(axis, lines, labels)
  return figure


def _style(axis: axes.Axes, name: str, drawn: history.Metrics) -> None:
  values = np.concatenate([series.values for series in drawn.values()])
  values = values[np.isfinite(values)]
  low, high = (values.min(), values.max()) if len(values) else (0, 0)
  log = not name.startswith('val/') and 0 < low * _LOG_RANGE < high
  if log:
    axis.set_yscale('log')
  title = axis.set_title(
    f'{name} (log)' if log else name, loc='left', fontsize=9, weight='bold'
  )
  title.set_parse_math(False)
  if len(drawn) == 1:
    last = next(iter(drawn.values())).values[-1]
    axis.set_title(f'{last:.4g}', loc='right', fontsize=8, color='#666')
  axis.tick_params(labelsize=7.5, color='#999', labelcolor='#444')
  axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axis.grid(color='#e5e5e5', linewidth=0.6)
  axis.set_axisbelow(True)
  axis.spines[['top', 'right']].set_visible(False)
  axis.spines[['left', 'bottom']].set_color('#999')


def _legend(axis: axes.Axes, lines: list, labels: list[str]) -> None:
  # Set after construction: matplotlib hides labels that start with '_' and
  # reads '$' as mathematics, and run names may hold either.
  legend = axis.legend(
    lines, [str(i) for i in range(len(lines))], fontsize=7, frameon=False
  )
  for text, label in zip(legend.get_texts(), labels, strict=True):
    text.set_parse_math(False)
    text.set_text(label)


def svg_bytes(figure: figures.Figure) -> bytes:
  """The figure as an SVG file, letters as outlines, the same at every call."""
  buffer = io.BytesIO()
  # Without the salt and the date two drawings of one curve would differ.
  with matplotlib.rc_context(
    {'svg.hashsalt': 'curves', 'svg.fonttype': 'path'}
  ):
    figure.savefig(buffer, format='svg', metadata={'Date': None})
  return buffer.getvalue()


def png_bytes(figure: figures.Figure, dots_per_inch: int = 160) -> bytes:
  """The figure as a PNG file."""
  backend_agg.FigureCanvasAgg(figure)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=dots_per_inch)
  return buffer.getvalue()
