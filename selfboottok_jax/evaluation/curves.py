"""The numbers that a run logged, and curves of them.

matplotlib is imported by the functions that draw: nothing else needs it.
Figures are built without pyplot, so nothing here is global or needs a screen.
"""

import io
import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from selfboottok_jax import errors, files

if TYPE_CHECKING:
  import matplotlib.axes
  import matplotlib.figure

# Okabe and Ito's colours, which colour-blind readers can distinguish too.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9')
MOST_POINTS = 400  # More points than that are averaged in bins.
_DASHES = ('--', ':', '-.')
_LOG_RANGE = 50  # Positive training terms spanning more get a log axis.
_LAST = ('learning_rate', 'images_per_second', 'data_wait')
_FIRST = ('loss', 'val/psnr', 'val/ssim')
REST = 'Rates, norms and speed'
_CODEBOOKS = re.compile(r'val/(codes_used|perplexity)')
# Neutral ink of a drawing, which follows the page from light to dark.
_INK, _INK_IN_THE_DARK = '#444444', '#d0d4d8'


class Series(NamedTuple):
  """The history of one logged number: increasing steps, and its values."""

  steps: Int[np.ndarray, ' n']
  values: Float[np.ndarray, ' n']


Metrics = Mapping[str, Series]  # By name, such as 'val/psnr'.


def read_metrics(path: str | os.PathLike[str]) -> dict[str, Series]:
  """Reads metrics.jsonl, or that file of a workdir, into series by name.

  Each line is an object with an integer `step` and numbers. Of two lines with
  the same step and name the later one counts: a resumed run writes again what
  it had written after its last checkpoint. A torn last line (the run was
  killed, or is still writing) is left out.

  Raises:
    UserError: the file cannot be read, or a line before the last is damaged.
  """
  path = files.as_path(path)
  try:
    with files.reaching(path):
      path = path / 'metrics.jsonl' if path.is_dir() else path
      lines = path.read_bytes().splitlines()
  except OSError as error:
    raise errors.UserError(
      f'Metrics {path} cannot be read ({error.strerror or "absent"}); give a '
      f'workdir or its metrics.jsonl.'
    ) from error
  numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
  points: dict[str, dict[int, float]] = {}
  for number, line in numbered:
    try:
      entry = json.loads(line)
    except ValueError as error:
      if number == numbered[-1][0]:
        break
      raise errors.UserError(
        f'Line {number} of {path} is torn or is not JSON ({line[:60]!r}); '
        f'remove that line to draw the rest.'
      ) from error
    step, values = _checked(entry, number, path)
    for name, value in values.items():
      points.setdefault(name, {})[step] = value
  return {
    name: Series(
      np.array(sorted(by_step), np.int64),
      np.array([by_step[step] for step in sorted(by_step)], np.float64),
    )
    for name, by_step in points.items()
  }


def _checked(
  entry: object, number: int, path: files.Path
) -> tuple[int, dict[str, float]]:
  """Splits a parsed line into step and numbers; null becomes NaN."""
  values = dict(entry) if isinstance(entry, dict) else {}
  step = values.pop('step', None)
  if type(step) is not int or not all(
    value is None or type(value) in (int, float) for value in values.values()
  ):
    raise errors.UserError(
      f'Line {number} of {path} is not a line of metrics; wanted an object '
      f'with an integer "step" and numbers, as {{"step": 10, "loss": 0.5}}.'
    )
  return step, {
    name: float('nan') if value is None else float(value)
    for name, value in values.items()
  }


def baselines(name: str, metrics: Metrics) -> dict[str, float]:
  """Collects the last values of the trivial baselines of a metric.

  `val/psnr_mean_image` is the baseline `mean image` of `val/psnr`.
  """
  return {
    key.removeprefix(f'{name}_').replace('_', ' '): float(series.values[-1])
    for key, series in metrics.items()
    if key.startswith(f'{name}_mean_')
  }


def panels(metrics: Metrics) -> list[str]:
  """Names of the panels to draw: losses, then evaluation, then throughput.

  A baseline is no panel of its own but a line in that of its metric. The gate
  of a single block has none: that of its group is drawn.
  """
  drawn_elsewhere = {
    key
    for key in metrics
    if ('_mean_' in key and key.split('_mean_')[0] in metrics)
    or re.fullmatch(r'fusion/gate_\w+_\d+', key)
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


def group(name: str) -> str:
  """Returns the heading under which a panel is folded, '' for those shown."""
  if _CODEBOOKS.match(name):
    return 'Codebooks'
  if name in _FIRST or name.startswith(('val/', 'train/')):
    return ''
  prefix = name.rpartition('/')[0]
  return (
    'Terms of the loss' if prefix == 'loss' else prefix.capitalize() or REST
  )


def thin(series: Series) -> Series:
  """Averages a long series in MOST_POINTS bins; keeps a short one."""
  count = len(series.steps)
  if count <= MOST_POINTS:
    return series
  edges = np.linspace(0, count, MOST_POINTS + 1).astype(np.int64)
  sizes = np.diff(edges)
  steps = np.add.reduceat(series.steps, edges[:-1]) // sizes
  return Series(steps, np.add.reduceat(series.values, edges[:-1]) / sizes)


def draw(name: str, runs: Mapping[str, Metrics]) -> 'matplotlib.figure.Figure':
  """Draws one metric over steps: a line for each run, baselines dashed.

  Args:
    name: a name that at least one of the runs logged.
    runs: run name -> its metrics; several runs get a legend.

  Raises:
    UserError: no run logged the name.
  """
  import matplotlib.figure

  drawn = {run: m[name] for run, m in runs.items() if name in m}
  if not drawn:
    raise errors.UserError(
      f'No metric "{name}" in the runs {sorted(runs)}; logged are '
      f'{sorted({key for m in runs.values() for key in m})}.'
    )
  figure = matplotlib.figure.Figure(figsize=(3.5, 2.3), layout='constrained')
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
    {pair for m in runs.values() for pair in baselines(name, m).items()}
  )
  lines = axis.get_lines()[: len(labels)]
  for index, (label, value) in enumerate(levels):
    style = _DASHES[index % len(_DASHES)]
    lines.append(
      axis.axhline(value, color=_INK, alpha=0.8, linewidth=1, linestyle=style)
    )
    labels.append(f'{label} {value:.2f}')
  _style(axis, name, drawn)
  if labels:
    _legend(axis, lines, labels)
  return figure


def _style(axis: 'matplotlib.axes.Axes', name: str, drawn: Metrics) -> None:
  """Titles, ticks and the scale of the axis."""
  from matplotlib import ticker

  values = np.concatenate([series.values for series in drawn.values()])
  values = values[np.isfinite(values)]
  low, high = (values.min(), values.max()) if len(values) else (0, 0)
  log = not name.startswith('val/') and 0 < low * _LOG_RANGE < high
  if log:
    axis.set_yscale('log')
  title = axis.set_title(
    f'{name} (log)' if log else name,
    loc='left',
    fontsize=9,
    weight='bold',
    color=_INK,
  )
  title.set_parse_math(False)
  if len(drawn) == 1:
    last = next(iter(drawn.values())).values[-1]
    axis.set_title(f'{last:.4g}', loc='right', fontsize=8, color=_INK)
  axis.tick_params(labelsize=7.5, color=_INK, labelcolor=_INK, width=0.5)
  axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  axis.grid(color=_INK, alpha=0.15, linewidth=0.6)
  axis.set_axisbelow(True)
  axis.spines[['top', 'right']].set_visible(False)
  axis.spines[['left', 'bottom']].set(color=_INK, alpha=0.5)


def _legend(
  axis: 'matplotlib.axes.Axes', lines: list[Any], labels: list[str]
) -> None:
  # Set after construction: matplotlib hides labels that start with '_' and
  # reads '$' as mathematics, and run names may hold either.
  legend = axis.legend(
    lines,
    [str(i) for i in range(len(lines))],
    fontsize=7,
    frameon=False,
    labelcolor=_INK,
  )
  for text, label in zip(legend.get_texts(), labels, strict=True):
    text.set_parse_math(False)
    text.set_text(label)


def svg_bytes(figure: 'matplotlib.figure.Figure') -> bytes:
  """Renders an SVG file with letters as outlines; equal at every call.

  It has no background, and its ink is light where the reader prefers dark.
  """
  import matplotlib

  buffer = io.BytesIO()
  # Without the salt and the date two drawings of one curve would differ.
  with matplotlib.rc_context(
    {'svg.hashsalt': 'curves', 'svg.fonttype': 'path'}
  ):
    figure.savefig(
      buffer, format='svg', metadata={'Date': None}, transparent=True
    )
  style = (
    f'<style>svg {{ color: {_INK} }} @media screen and (prefers-color-scheme: '
    f'dark) {{ svg {{ color: {_INK_IN_THE_DARK} }} }}</style>\n <metadata>'
  )
  drawn = buffer.getvalue().replace(_INK.encode(), b'currentColor')
  return drawn.replace(b'<metadata>', style.encode(), 1)
