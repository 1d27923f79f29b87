r"""Times a training step, its loop and its data on this machine.

  python -m launch.benchmark --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS

Works without data and without a tokenizer: step and loop are then timed on
made-up images, and what was assumed is printed. Prints a table and, as the last
line, JSON. Step and loop take turns, so their ratio holds on a busy machine;
many short rounds (--rounds=40 --steps=4) measure it best.

  python -m launch.benchmark --data --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS

times the way of the images instead: decoding, resizing, batching, transfer, the
pipeline with threads and with processes, and a training on it; prints images/s
per core, the share of waiting for data, and what bounds the speed.

  python -m launch.benchmark --suite --out=suite.json

checks this machine's arithmetic, and times train steps, sampling and encoding
at the paper's sizes in eight minutes; on CPUs, at tiny ones. It needs nothing
else. The exit code is 1 if a check failed.
"""

import json
import sys
from typing import Any

from launch import cli
from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import tables
from selfboottok_jax.stages import benchmark, data_benchmark, suite

FLAGS = cli.Flags()
_CONFIG = FLAGS.config()
_STEPS = FLAGS.integer('steps', 20, 'Updates in a round.')
_ROUNDS = FLAGS.integer('rounds', 5, 'Rounds; medians are reported.')
_OUT = FLAGS.string('out', '', 'File to write the JSON to as well.')
_DATA = FLAGS.switch('data', False, 'Time the data and what bounds it.')
_SUITE = FLAGS.switch('suite', False, 'Check and time this machine instead.')
_SIZE = FLAGS.string('size', '', 'Of the suite: full or tiny; by the device.')
_ONLY = FLAGS.strings(
  'only',
  [],
  f'Groups ({",".join(suite.GROUPS)}) or entries of the suite; all if empty.',
)
_SECONDS = FLAGS.number('seconds', 480.0, 'Nothing of the suite begins later.')


def main() -> None:
  """Measures and prints."""
  cli.check_least(_STEPS, 1)
  cli.check_least(_ROUNDS, 1)
  if _OUT.value:
    out = files.as_path(_OUT.value)
    files.check_folder('out', out.parent)
    if out.is_dir():
      raise errors.ConfigError(f'--out={_OUT.value} is a folder; wanted a file')
  if _SUITE.value and _DATA.value:
    raise errors.ConfigError('--suite and --data are given; wanted one of them')
  if _SUITE.value:
    _run_suite()
    return
  config = _CONFIG.value
  cli.start_jax()
  timed = data_benchmark.measure if _DATA.value else benchmark.measure
  record, notes = timed(config, _STEPS.value, _ROUNDS.value)
  record = {'config': _CONFIG.name, **record}
  cli.say('\n'.join(notes))
  rows = [{'measure': k, 'value': _shown(v)} for k, v in record.items()]
  cli.say(tables.table(rows, ['measure', 'value']))
  cli.say(json.dumps(record))
  _write(record)


def _run_suite() -> None:
  """Runs the suite; prints a line as each entry ends, then all as JSON."""
  cli.start_jax()
  entries: list[dict[str, Any]] = []

  def keep(entry: dict[str, Any]) -> None:
    cli.say(_one_line(entry))
    # A machine that is taken away in the middle leaves what was measured.
    entries.append(entry)
    _write({'complete': False, 'entries': entries})

  record = suite.run(
    _SIZE.value, only=_ONLY.value, seconds=_SECONDS.value, on_record=keep
  )
  cli.say(json.dumps(record))
  _write(record)
  if not record['ok']:
    sys.exit(1)


def _one_line(entry: dict[str, Any]) -> str:
  """An entry of the suite as text."""
  values = ' '.join(
    f'{name}={value if isinstance(value, str) else tables.number(value)}'
    for name, value in entry.items()
    if name not in ('group', 'name') and value is not None
  )
  return f'{entry["group"]} {entry["name"]}: {values}'


def _write(record: dict[str, Any]) -> None:
  """Writes --out, if it was given."""
  if not _OUT.value:
    return
  try:
    line = json.dumps(record).encode() + b'\n'
    files.write_atomically(_OUT.value, line)
  except OSError as error:
    raise errors.ConfigError(
      f'--out={_OUT.value} cannot be written ({error.strerror}); choose '
      'another file'
    ) from error


def _shown(value: Any) -> str:
  """A measure as text; '' if it was not taken."""
  if isinstance(value, list):
    return ' to '.join(tables.number(item) for item in value)
  return '' if value is None else tables.number(value)


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
