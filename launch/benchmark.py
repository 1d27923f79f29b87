r"""Times a training step, its loop and its data on this machine.

  python -m launch.benchmark --config=configs/tokenizer.py:photos64 \
    --config.data.path=PHOTOS

Works without data and without a tokenizer: step and loop are then timed on
made-up images, and what was assumed is printed. Prints a table and, as the last
line, JSON. Step and loop take turns, so their ratio holds on a busy machine;
many short rounds (--rounds=40 --steps=4) measure it best.
"""

import json
import os
from typing import Any

from launch import cli
from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import tables
from selfboottok_jax.stages import benchmark

FLAGS = cli.Flags()
_CONFIG = FLAGS.config()
_STEPS = FLAGS.integer('steps', 20, 'Updates in a round.')
_ROUNDS = FLAGS.integer('rounds', 5, 'Rounds; medians are reported.')
_OUT = FLAGS.string('out', '', 'File to write the JSON to as well.')


def main() -> None:
  """Measures and prints."""
  config = _CONFIG.value
  cli.check_least(_STEPS, 1)
  cli.check_least(_ROUNDS, 1)
  if _OUT.value:
    files.check_folder('out', os.path.dirname(_OUT.value) or '.')
    if os.path.isdir(_OUT.value):
      raise errors.ConfigError(f'--out={_OUT.value} is a folder; wanted a file')
  cli.start_jax()
  record, notes = benchmark.measure(config, _STEPS.value, _ROUNDS.value)
  record = {'config': _CONFIG.name, **record}
  cli.say('\n'.join(notes))
  rows = [{'measure': k, 'value': _shown(v)} for k, v in record.items()]
  cli.say(tables.table(rows, ['measure', 'value']))
  line = json.dumps(record)
  cli.say(line)
  if _OUT.value:
    try:
      files.write_atomically(_OUT.value, line.encode() + b'\n')
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
