"""Scores of several runs as tables for people, each protocol told once.

A protocol is told in two footnotes: how a metric was measured, by number, and
which state of which run, by letter. A mark that a whole row or column shares
stands at its head.
"""

import dataclasses
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from selfboottok_jax.evaluation import scores, tables

# Heading and metrics of each group: the first that fits a name has it.
_KINDS = (
  ('Codebooks', r'usage|codes_used|perplexity|latent|transport'),
  ('Reconstructions', r'psnr|ssim|lpips|distance|rfid'),
  ('Sets of pictures', r''),
)
# The order of the groups on a page, and those that are folded there.
_ORDER = ('Reconstructions', 'Sets of pictures')
FOLDED = ('Codebooks',)
# What a protocol says of the run and the machine, not of the metric.
_OF_RUN = (
  *('step', 'parameters', 'run_weights', 'tokenizer', 'tokenizer_step'),
  *('tokenizer_weights', 'seed', 'backend', 'device', 'version'),
)


@dataclasses.dataclass(frozen=True)
class Cell:
  """A number, and the marks that are not at the head of its row or column."""

  value: str
  marks: str
  warning: str


@dataclasses.dataclass(frozen=True)
class Line:
  """A metric's values by run; a run may have several, by several protocols."""

  metric: str
  arrow: str
  mark: str
  cells: Sequence[Sequence[Cell]]


@dataclasses.dataclass(frozen=True)
class Group:
  """Metrics of a kind; `runs` are the columns, as (name, mark)."""

  title: str
  is_folded: bool
  runs: Sequence[tuple[str, str]]
  lines: Sequence[Line]


@dataclasses.dataclass(frozen=True)
class ScoreTables:
  """Groups of scores, and their footnotes as (mark, text)."""

  groups: Sequence[Group]
  footnotes: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class _Marked:
  score: scores.Score
  number: str
  letter: str


def arrange(found: Sequence[scores.Score]) -> ScoreTables:
  """Arranges scores by kind, metric and run; none is left out."""
  titles = (*_ORDER, *FOLDED)
  # Footnotes are counted in the order of the page.
  found = sorted(found, key=lambda score: titles.index(_kind(score.metric)))
  hows = [_told(s.protocol, set(s.protocol).difference(_OF_RUN)) for s in found]
  # In one order of keys, so that equal states have one mark.
  states = [
    _told({k: s.protocol.get(k) for k in _OF_RUN}, set(s.protocol))
    for s in found
  ]
  numbers = _marks(hows, lambda index: str(index + 1))
  letters = _marks(states, _letter)
  by_kind: dict[str, list[_Marked]] = {}
  for score, how, state in zip(found, hows, states, strict=True):
    marked = _Marked(score, numbers[how], letters[state])
    by_kind.setdefault(_kind(score.metric), []).append(marked)
  return ScoreTables(
    [_group(k, by_kind[k]) for k in titles if k in by_kind],
    [(m, text) for text, m in (*numbers.items(), *letters.items()) if text],
  )


def arrow(metric: str) -> str:
  """Points to better values: up, down, or '' where neither is."""
  directions: Mapping[bool | None, str] = {True: '↑', False: '↓', None: ''}
  return directions[scores.higher_is_better(metric)]


def _told(protocol: Mapping[str, Any], wanted: set[str]) -> str:
  return scores.in_words({k: v for k, v in protocol.items() if k in wanted})


def _marks(texts: Iterable[str], mark: Callable[[int], str]) -> dict[str, str]:
  """A mark for each text in their order; '' has none."""
  distinct = [text for text in dict.fromkeys(texts) if text]
  return {'': ''} | {text: mark(i) for i, text in enumerate(distinct)}


def _letter(index: int) -> str:
  letters = string.ascii_lowercase
  before = index // len(letters)
  return (_letter(before - 1) if before else '') + letters[index % len(letters)]


def _kind(metric: str) -> str:
  return next(
    title for title, pattern in _KINDS if re.match(pattern, metric.lower())
  )


def _group(title: str, marked: Sequence[_Marked]) -> Group:
  runs = {
    run: _shared(m.letter for m in marked if m.score.run == run)
    for run in dict.fromkeys(m.score.run for m in marked)
  }
  lines = []
  for metric in dict.fromkeys(m.score.metric for m in marked):
    own = [m for m in marked if m.score.metric == metric]
    number = _shared(m.number for m in own)
    cells = [
      [
        Cell(
          tables.number(m.score.value),
          (m.number if number is None else '')
          + (m.letter if letter is None else ''),
          str(m.score.protocol.get('warning', '')),
        )
        for m in own
        if m.score.run == run
      ]
      for run, letter in runs.items()
    ]
    lines.append(Line(metric, arrow(metric), number or '', cells))
  columns = [(run, letter or '') for run, letter in runs.items()]
  return Group(title, title in FOLDED, columns, lines)


def _shared(marks: Iterable[str]) -> str | None:
  """The mark, if all are equal."""
  distinct = set(marks)
  return distinct.pop() if len(distinct) == 1 else None
