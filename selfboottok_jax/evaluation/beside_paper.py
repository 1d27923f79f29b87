"""The paper's numbers beside those of their sources and of one's own runs."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from selfboottok_jax.evaluation import published, scores, tables

NOT_RUN = 'not run'
# Images behind a number of the paper: ImageNet's validation set, or samples.
_COUNT = 50_000
# By metric of the paper: ours of the same protocol, and ours of its kind.
_SAME = {
  'rfid': 'rfid',
  'gfid': 'fid',
  'gfid_guided': 'fid',
  'psnr': 'psnr',
  # The convention of the code that the paper builds on.
  'ssim': 'ssim_range2',
}
_KIND = {
  'rfid': r'rfid|fd_',
  'gfid': r'fid|fd_',
  'gfid_guided': r'fid|fd_',
  'psnr': r'psnr',
  'ssim': r'ssim',
}
_BASELINE = re.compile(r'.*(_mean_|_gaussian_codes)')
# Metrics of samples, and whether these have guidance.
_GUIDED = {'gfid': False, 'gfid_guided': True}


@dataclasses.dataclass(frozen=True)
class Line:
  """A metric of a row: texts of the columns paper, source and here.

  A row of which nothing is known has one line for all its metrics.
  """

  metric: str
  paper: str
  source: str
  here: str


@dataclasses.dataclass(frozen=True)
class Entry:
  """A row of a table, with a line for each metric that is known."""

  row: published.Row
  tokens: str
  lines: Sequence[Line]


@dataclasses.dataclass(frozen=True)
class Shown:
  """A table of the paper; `is_run` if a run has the design of a row."""

  table: published.Table
  entries: Sequence[Entry]
  is_run: bool


def show(
  configs: Mapping[str, Mapping[str, Any]],
  found: Sequence[scores.Score],
) -> list[Shown]:
  """Arranges the paper's tables with what runs have measured.

  A number of a run stands in the place of the paper's only if the run has the
  row's design and the paper's size, and the score its metric and its number of
  images. Other scores of runs of the row's design are named beside "not run".

  Args:
    configs: by run, the configuration of its tokenizer: its own or, for a
      generator, that of the run that decodes for it.
    found: the scores of the runs.
  """
  return [
    _show(published.table(name), configs, found) for name in published.TABLES
  ]


def _show(
  table: published.Table,
  configs: Mapping[str, Mapping[str, Any]],
  found: Sequence[scores.Score],
) -> Shown:
  entries, is_run = [], False
  for row in table.rows:
    runs = [
      run for run, config in configs.items() if published.is_row(config, row)
    ]
    scale = {**table.scale, **row.scale}
    large = [run for run in runs if published.is_like(configs[run], scale)]
    is_run |= bool(runs)
    own = [score for score in found if score.run in runs]
    lines = [
      Line(
        published.METRICS[metric],
        published.text(row.paper.get(metric)),
        published.text(row.source.get(metric)),
        _here(metric, own, large),
      )
      for metric in table.metrics
    ]
    known = [x for x in lines if x.paper or x.source or x.here != NOT_RUN]
    every = ', '.join(line.metric for line in lines)
    lines = known or [Line(every, '', '', NOT_RUN)]
    tokens = {**row.paper, **row.source}.get('tokens')
    entries.append(Entry(row, published.text(tokens), lines))
  return Shown(table, entries, is_run)


def _here(
  metric: str, found: Sequence[scores.Score], large: Sequence[str]
) -> str:
  """Numbers of the paper's protocol, or others beside NOT_RUN."""
  kind = [s for s in found if _is_of_kind(s, metric)]
  same = [
    f'{tables.number(s.value)} ({s.run})'
    for s in kind
    if s.run in large and _is_same(s, metric)
  ]
  others = [f'{s.metric} {tables.number(s.value)} ({s.run})' for s in kind]
  return ', '.join(same) or '; '.join([NOT_RUN, *others])


def _is_of_kind(score: scores.Score, metric: str) -> bool:
  """True for a score of reconstructions or of samples, as the metric is."""
  # Samples have a sampler.
  is_of_samples = 'sampler' in score.protocol
  guidance = score.protocol.get('guidance')
  return (
    re.match(_KIND[metric], score.metric) is not None
    and not _BASELINE.match(score.metric)
    and is_of_samples == (metric in _GUIDED)
    and (not is_of_samples or (guidance not in (None, 1)) == _GUIDED[metric])
  )


def _is_of_statistics(score: scores.Score) -> bool:
  """True for samples compared with a file of statistics, as ADM's is.

  Such a file does not say of how many images it is; photographs do.
  """
  protocol = score.protocol
  reference = str(protocol.get('reference', ''))
  return reference.endswith('.npz') and 'reference_count' not in protocol


def _is_same(score: scores.Score, metric: str) -> bool:
  """True for a score of the paper's protocol, as far as protocols tell."""
  return (
    score.metric == _SAME[metric]
    and score.protocol.get('count', 0) >= _COUNT
    and 'warning' not in score.protocol
    and score.protocol.get('convention', 'adm') == 'adm'
    and (metric not in _GUIDED or _is_of_statistics(score))
  )
