"""The tables of an ablation: mean and spread over seeds, beside the paper's."""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import markdown, published, scores, tables

NAME = 'ablation'
RECONSTRUCTIONS, SAMPLES, COST = 'reconstructions', 'samples', 'cost'
# Where the paper's metrics stand here, as (of what, metric).
PUBLISHED = {
  'gfid_guided': (SAMPLES, 'fid'),
  'rfid': (RECONSTRUCTIONS, 'rfid'),
  'psnr': (RECONSTRUCTIONS, 'psnr'),
  'ssim': (RECONSTRUCTIONS, 'ssim_range2'),
}
# Metrics of cost, and their headings.
COSTS = {
  'parameters': 'parameters of the tokenizer',
  'forward_gflops': 'GFLOPs to encode and decode an image',
  'train_pflops': 'PFLOPs of all its trainings',
  'train_seconds': 'their seconds',
}
# Baselines, which are in ablation.json and not in the tables.
_BASELINE = re.compile(r'.*(_mean_|gaussian_codes)')
# Parts of a protocol in which runs of the same table differ.
_OF_RUNS = (
  *('run_weights', 'tokenizer_weights', 'step', 'tokenizer_step', 'seed'),
  'reference_fingerprint',
)
NOT_RUN = 'not run'


@dataclasses.dataclass(frozen=True)
class Value:
  """A number of one run of a row.

  Attributes:
    table: key of the table.
    row: name of the row in it.
    title: the row's label.
    seed: of the trainings.
    metric: what was measured.
    of: RECONSTRUCTIONS, SAMPLES or COST.
    value: the number.
    protocol: everything that it depends on.
  """

  table: str
  row: str
  title: str
  seed: int
  metric: str
  of: str
  value: float | int
  protocol: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
  """A table to fill.

  Attributes:
    name: its key.
    title: the heading.
    rows: labels by name, those that were not run too.
    notes: sentences below the table.
  """

  name: str
  title: str
  rows: Mapping[str, str]
  notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Cell:
  """The text of a cell; `paper` is the paper's number, '' if it gives none."""

  text: str
  paper: str = ''


@dataclasses.dataclass(frozen=True)
class Grid:
  """Numbers as text.

  Attributes:
    groups: headings above the heads, each with the number of its columns.
    head: of each column.
    body: (label, cells) of each row.
  """

  groups: Sequence[tuple[str, int]]
  head: Sequence[str]
  body: Sequence[tuple[str, Sequence[Cell]]]

  @property
  def names(self) -> list[str]:
    """The heads with what they are of, where no heading stands above them."""
    of = [of for of, count in self.groups for _ in range(count)]
    return [
      f'{name} of {of}' if of in (SAMPLES, RECONSTRUCTIONS) else name
      for name, of in zip(self.head, of, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Filled:
  """A table as text: scores and costs, failed rows, notes."""

  title: str
  grids: Sequence[Grid]
  failed: Sequence[tuple[str, str]]
  notes: Sequence[str]


def mean_and_spread(
  values: Sequence[float | int],
) -> tuple[float, float | None]:
  """Mean and sample standard deviation over seeds; None for a single one."""
  array = np.asarray(values, np.float64)
  spread = float(array.std(ddof=1)) if len(array) > 1 else None
  return float(array.mean()), spread


def fill(
  table: Table, values: Sequence[Value], failures: Mapping[str, str]
) -> Filled:
  """Fills a table.

  Args:
    table: the table; values of others are left out.
    values: all numbers.
    failures: reasons by name of the rows that failed.
  """
  own = [value for value in values if value.table == table.name]
  columns = _columns(table, own)
  cost = [(COST, metric) for metric in COSTS]
  grids = [_grid(table, own, columns)]
  if any(value.of == COST for value in own):
    grids.append(_grid(table, own, cost))
  failed = [
    (label, failures[name])
    for name, label in table.rows.items()
    if name in failures
  ]
  return Filled(
    table.title, grids, failed, [*_protocols(own, columns), *table.notes]
  )


def _grid(
  table: Table, own: Sequence[Value], columns: Sequence[tuple[str, str]]
) -> Grid:
  body = []
  for name, label in table.rows.items():
    of_row = [value for value in own if value.row == name]
    seeds = sorted({value.seed for value in of_row})
    cells = [Cell(', '.join(map(str, seeds)) or NOT_RUN)]
    for of, metric in columns:
      found = [v.value for v in of_row if (v.of, v.metric) == (of, metric)]
      printed = _printed(table.name, name, of, metric)
      text = _text(metric, found)
      if metric not in COSTS and 0 < len(found) < len(seeds):
        text += f' ({len(found)} of {len(seeds)} seeds)'
      cells.append(Cell(text, published.text(printed)))
    body.append((label, cells))
  groups = collections.Counter(of for of, _ in columns)
  heads = ['seeds', *(_heading(metric) for _, metric in columns)]
  return Grid([('', 1), *groups.items()], heads, body)


def write(
  workdir: files.Path,
  title: str,
  about: Sequence[str],
  to_fill: Sequence[Table],
  values: Sequence[Value],
  failures: Mapping[str, Mapping[str, str]],
) -> None:
  """Writes ablation.json, ablation.md and ablation.html.

  Args:
    workdir: folder for them.
    title: of the page.
    about: sentences on what all rows share.
    to_fill: the tables.
    values: all numbers.
    failures: reasons by table and row.
  """
  filled = [fill(t, values, failures.get(t.name, {})) for t in to_fill]
  records = [dataclasses.asdict(value) for value in values]
  files.write_json(workdir / f'{NAME}.json', records)
  page = _markdown(title, about, filled)
  files.write_atomically(workdir / f'{NAME}.md', page.encode())
  html = _html(title, about, filled)
  files.write_atomically(workdir / f'{NAME}.html', html.encode())


def read(workdir: files.Given) -> list[Value]:
  """Reads ablation.json; [] if there is none, UserError if it is damaged."""
  path = files.as_path(workdir) / f'{NAME}.json'
  if not files.exists(path):
    return []
  try:
    return [Value(**record) for record in json.loads(path.read_bytes())]
  except (ValueError, TypeError) as error:
    raise errors.UserError(
      f'{path} is damaged ({error}); the launch.ablate that wrote it writes '
      'it anew'
    ) from error


def _columns(table: Table, own: Sequence[Value]) -> list[tuple[str, str]]:
  """Scores of a table, first of samples; of each the paper's come first.

  What has no direction, as the use of codes, is in ablation.json alone.
  """
  printed = [
    column
    for metric, column in PUBLISHED.items()
    if any(_published(table.name, n, metric) is not None for n in table.rows)
  ]
  found = printed + [
    (v.of, v.metric)
    for v in own
    if v.of != COST
    and scores.higher_is_better(v.metric) is not None
    and not _BASELINE.match(v.metric)
  ]
  # The inflated SSIM is for comparing with published numbers alone.
  inflated = RECONSTRUCTIONS, 'ssim_range2'
  unique = [c for c in dict.fromkeys(found) if c != inflated or c in printed]
  return sorted(unique, key=lambda column: column[0] != SAMPLES)


def _published(table: str, row: str, metric: str) -> float | None:
  if table not in published.TABLES:
    return None
  return published.value(table, row, metric)


def _printed(table: str, row: str, of: str, metric: str) -> float | None:
  """The paper's number for a column."""
  names = [name for name, where in PUBLISHED.items() if where == (of, metric)]
  return _published(table, row, names[0]) if names else None


def _heading(metric: str) -> str:
  direction = scores.higher_is_better(metric)
  arrow = {True: ' ↑', False: ' ↓', None: ''}[direction]
  return COSTS.get(metric, f'{metric}{arrow}')


def _text(metric: str, found: Sequence[float | int]) -> str:
  """Mean and spread as text, with as many digits as mean something."""
  if not found:
    return NOT_RUN
  mean, spread = mean_and_spread(found)
  if metric == 'parameters':
    return f'{round(mean):,}'
  # Costs do not depend on the seed.
  if spread is None or (metric in COSTS and spread <= 1e-9 * mean):
    return tables.number(mean)
  # Two digits of the spread, and the mean to the same place.
  digits = max(0, 1 - math.floor(math.log10(spread))) if spread else 4
  digits = min(digits, 6)
  return f'{mean:,.{digits}f} ± {spread:,.{digits}f}'


def _protocols(
  own: Sequence[Value], columns: Sequence[tuple[str, str]]
) -> list[str]:
  """A sentence for each protocol, without what differs between runs."""
  grouped: dict[str, list[str]] = {}
  for value in own:
    if (value.of, value.metric) not in columns:
      continue
    # They are in ablation.json.
    shown = {k: v for k, v in value.protocol.items() if k not in _OF_RUNS}
    names = grouped.setdefault(scores.in_words(shown), [])
    name = f'{value.metric} of {value.of}'
    if name not in names:
      names.append(name)
  return [f'{", ".join(names)}: {how}.' for how, names in grouped.items()]


def _markdown(
  title: str, about: Sequence[str], filled: Sequence[Filled]
) -> str:
  def cell(cell: Cell) -> str:
    return f'{cell.text} (paper: {cell.paper})' if cell.paper else cell.text

  parts = [f'# {title}', '\n'.join(f'- {line}' for line in about)]
  for table in filled:
    parts.append(f'## {table.title}')
    for grid in table.grids:
      rows = [[label, *map(cell, cells)] for label, cells in grid.body]
      parts.append(markdown.table(['', *grid.names], rows))
    notes = [
      *(f'**{label}** failed: {why}' for label, why in table.failed),
      *table.notes,
    ]
    parts.append('\n'.join(f'- {markdown.cell(note)}' for note in notes))
  return '\n\n'.join(part for part in parts if part) + '\n'


def _html(title: str, about: Sequence[str], filled: Sequence[Filled]) -> str:
  import jinja2

  environment = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__ or '', 'templates'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
  )
  return environment.get_template(f'{NAME}.html').render(
    title=title, about=about, tables=filled, not_run=NOT_RUN
  )
