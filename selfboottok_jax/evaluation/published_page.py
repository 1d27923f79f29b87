"""The page docs/results/table1.md, made of the data in `paper_tables`."""

from selfboottok_jax.evaluation import markdown, published

_HEAD = """\
# Table 1 of the paper, and 1.56 in context

Made of `selfboottok_jax/evaluation/paper_tables`; after a change of the data
`python -m tests.evaluation.published_page_test` writes this page anew. No
number on it was measured with this package.

| a cell such as | says |
| --- | --- |
| 0.88 | paper and source agree |
| **0.94** (paper: 0.59) | they disagree; the source's number first |
| 6.93 ? | printed in the paper, in no public repository |
| **2.35** (not in the paper) | the source has it, the paper leaves it out |
| – | neither has a number |

The source is the repository of the row's own authors, as the last column says.
Licences are those of the repositories' code; "?" is one that was not seen.
"""

_CONTEXT = """\
The paper calls its gFID of 1.56 the best of 1D tokenizers with 64 tokens.
Beside it: MacTok reports 1.44 with 64 or 128 tokens, FlatDINO 1.80 with half as
many, RAEv2 1.06 with 256. Real validation images score 1.68 against the same
reference, so numbers below that say little about pictures; `fdr` of
[launch.evaluate](../evaluation.md) measures such systems by several networks.
"""


def page() -> str:
  """Returns the page as Markdown."""
  first, context = map(published.table, ('table1', 'context'))
  groups = dict.fromkeys(row.group for row in first.rows)
  parts = [_HEAD, f'## {first.title}\n', f'{first.note}\n']
  for group in groups:
    rows = [row for row in first.rows if row.group == group]
    parts += [f'### {group}\n', f'{_table(first, rows)}\n']
  parts += [f'## {context.title}\n', _CONTEXT, f'{context.note}\n']
  ours = [row for row in first.rows if row.name == 'selfboottok']
  ranked = sorted((*context.rows, *ours), key=_best)
  return '\n'.join([*parts, f'{_table(context, ranked)}\n'])


def cell(row: published.Row, key: str) -> str:
  """Formats a number, or the count of tokens, with who says so."""
  said = (row.paper, row.source)
  paper, source = (published.text(by.get(key)) for by in said)
  if not row.paper or paper == source:
    return source or '–'
  if paper and source:
    return f'**{source}** (paper: {paper})'
  return f'{paper} ?' if paper else f'**{source}** (not in the paper)'


def _table(table: published.Table, rows: list[published.Row]) -> str:
  heads = [published.METRICS[metric] for metric in table.metrics]
  return markdown.table(
    ['System', 'Tokens', *heads, 'Licence', 'Where the numbers come from'],
    [
      [
        row.system,
        _tokens(row),
        *(cell(row, metric) for metric in table.metrics),
        row.licence,
        row.origin,
      ]
      for row in rows
    ],
  )


def _tokens(row: published.Row) -> str:
  # A source that does not say otherwise has the paper's count.
  given = {'tokens': row.paper.get('tokens', ''), **row.source}
  same = given['tokens'] == row.paper.get('tokens', given['tokens'])
  return given['tokens'] or '–' if same else cell(row, 'tokens')


def _best(row: published.Row) -> float:
  """The lowest gFID of a row."""
  said = {**row.paper, **row.source}
  return min(said[key] for key in ('gfid', 'gfid_guided') if key in said)
