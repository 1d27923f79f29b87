"""Tables and figures of the paper, and newer systems, as data.

The files of `paper_tables` hold what the paper prints (arXiv 2606.05552) beside
what the repositories of the rows' own authors say. Numbers that the paper draws
but does not print are left out.

`gfid` is the Frechet distance of samples without guidance, `gfid_guided` with.
"""

import dataclasses
import functools
import importlib.resources
import tomllib
from collections.abc import Mapping
from typing import Any

from selfboottok_jax import errors, trees

TABLES = ('table1', 'table2', 'table3', 'figure5', 'figure6', 'context')
METRICS = {
  'rfid': 'rFID',
  'gfid': 'gFID without guidance',
  'gfid_guided': 'gFID with guidance',
  'psnr': 'PSNR',
  'ssim': 'SSIM',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A system, or a variant of one.

  Attributes:
    name: unique in its table.
    system: the row's label.
    group: the heading above it, '' for none.
    paper: what the paper prints: numbers by metric, and `tokens` as text.
    source: what the repository or paper of the row's own authors says.
    licence: of that repository; '?' if it was not seen.
    origin: where `source` comes from, and what is to be known about it.
    here: what a configuration needs to be this row, see `is_row`; empty if
      this package has no such run.
    scale: what it needs besides to be as large as the row.
  """

  name: str
  system: str
  group: str = ''
  paper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  source: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  licence: str = ''
  origin: str = ''
  here: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  scale: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation:
  """A choice that the paper leaves open; `field` is the key of it, if any."""

  question: str
  chosen: str
  field: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A table or figure of the paper.

  Attributes:
    name: one of TABLES.
    title: the heading.
    metrics: keys of METRICS, the columns.
    rows: in the paper's order.
    note: what a reader of the numbers has to know.
    scale: what a configuration needs to be as large as the paper's.
  """

  name: str
  title: str
  metrics: tuple[str, ...]
  rows: tuple[Row, ...]
  note: str = ''
  scale: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@functools.cache
def table(name: str) -> Table:
  """Reads one of TABLES.

  Raises:
    UserError: no table has the name.
  """
  if name not in TABLES:
    raise errors.UserError(
      f'no table {name!r} of the paper; wanted one of {", ".join(TABLES)}'
    )
  values = _read(name)
  rows = tuple(
    # `from` is a keyword of Python.
    Row(**{'origin' if k == 'from' else k: v for k, v in row.items()})
    for row in values.pop('rows')
  )
  return Table(
    name=name, **{**values, 'metrics': tuple(values['metrics'])}, rows=rows
  )


def is_row(config: Mapping[str, Any], row: Row) -> bool:
  """Returns True for a configuration that has the design of a row.

  It meets `row.here` and, in everything that this does not name, the method's
  own choices. `design.toml` lists them.
  """
  flat = trees.flatten(config)
  others = {k: v for k, v in _read('design').items() if k not in row.here}
  chosen = {k: v for k, v in others.items() if k in flat}
  return bool(row.here) and is_like(config, {**chosen, **row.here})


def deviations() -> list[Deviation]:
  """Reads what the paper leaves open, as docs/deviations.md tells it."""
  return [Deviation(**row) for row in _read('deviations')['rows']]


def _read(name: str) -> dict[str, Any]:
  folder = importlib.resources.files(__package__) / 'paper_tables'
  return tomllib.loads((folder / f'{name}.toml').read_text('utf-8'))


def value(name: str, row: str, metric: str) -> float | None:
  """Looks up a number that the paper prints; None if it prints none.

  Args:
    name: of a table, one of TABLES or another that the paper does not have.
    row: name of a row, of the paper or not.
    metric: a key of METRICS.
  """
  rows = table(name).rows if name in TABLES else ()
  found = [printed.paper.get(metric) for printed in rows if printed.name == row]
  return found[0] if found else None


def text(number: float | str | None) -> str:
  """Formats a number with the digits that were printed; '' for None."""
  if isinstance(number, float):
    two = f'{number:.2f}'
    return two if float(two) == number else f'{number:g}'
  return '' if number is None else str(number)


def is_like(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
  """Compares a nested configuration with conditions on its flattened keys.

  A condition is the value itself, '> 0' for a positive number, or text that the
  value begins with, '' for any. An absent key meets none.
  """
  flat = trees.flatten(config)

  def holds(key: str, condition: Any) -> bool:
    found = flat.get(key)
    if condition == '> 0':
      return isinstance(found, int | float) and found > 0
    if isinstance(condition, str):
      return str(found).startswith(condition)
    return found == condition

  return all(holds(key, condition) for key, condition in wanted.items())
