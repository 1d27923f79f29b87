"""Numbers and plain-text tables for people."""

import math
from collections.abc import Mapping, Sequence


def number(value: object) -> str:
  """Formats counts with thousands separators, measurements with few digits."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return str(value)
  if isinstance(value, int):
    return f'{value:,}'
  if not math.isfinite(value):
    return str(float(value))
  size = abs(value)
  if size >= 1000:
    return f'{value:,.0f}'
  if size >= 100:
    return f'{value:.1f}'
  if size >= 1:
    return f'{value:.2f}'
  return f'{value:.4f}' if size >= 1e-3 or size == 0 else f'{value:.2e}'


def duration(seconds: float | int) -> str:
  """Formats seconds as `12 s`, `3 min 05 s` or `2 h 07 min`."""
  if not math.isfinite(seconds):
    return 'unknown'
  whole = round(seconds)
  if whole < 60:
    return f'{seconds:.1f} s' if seconds < 9.95 else f'{whole} s'
  if whole < 3600:
    return f'{whole // 60} min {whole % 60:02d} s'
  minutes = round(seconds / 60)
  return f'{minutes // 60} h {minutes % 60:02d} min'


def size(count: int) -> str:
  """Formats bytes as `12 B`, `3.4 MiB` or `56.7 GiB`."""
  value, units = float(count), ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  while value >= 1024 and len(units) > 1:
    value /= 1024
    units.pop(0)
  digits = 0 if units[0] == 'B' or value >= 100 else 1
  return f'{value:.{digits}f} {units[0]}'


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
  """Formats rows as aligned text: words to the left, numbers to the right.

  Args:
    rows: a mapping from column to value for each row; missing ones are blank.
    columns: the columns and their order, printed as the heading.

  Returns:
    Lines without trailing blanks and without a last line break.
  """
  cells = [[number(row.get(name, '')) for name in columns] for row in rows]
  right = [
    any(isinstance(row.get(name), int | float) for row in rows)
    for name in columns
  ]
  lines = [list(columns), *cells]
  widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
  lines.insert(1, ['-' * width for width in widths])
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if to_right else cell.ljust(width)
      for cell, width, to_right in zip(line, widths, right, strict=True)
    ).rstrip()
    for line in lines
  )
