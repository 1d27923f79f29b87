"""Pieces of Markdown pages."""

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Formats a table; cells are text, in which `|` and line breaks are kept."""
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(map(cell, line))} |' for line in lines)


def cell(text: object) -> str:
  """Escapes what would end a cell, or begin HTML in it."""
  text = (
    str(text).replace('&', '&amp;').replace('<', '&lt;').replace('|', r'\|')
  )
  return '<br>'.join(text.splitlines())
