r"""Scores a tokenizer's reconstructions, or a generator's samples.

  python -m launch.evaluate --workdir=runs/tok --config.data.path=PHOTOS
  python -m launch.evaluate --workdir=runs/gen --tokenizer=runs/tok_big \
    --config.data.path=PHOTOS

Prints a table and one JSON line, and writes scores.json into the workdir.
"""

import dataclasses
import json

from launch import cli
from selfboottok_jax import files
from selfboottok_jax.evaluation import scores, tables
from selfboottok_jax.stages import score

FLAGS = cli.Flags()
_CONFIG = FLAGS.config('configs/evaluate.py')
_WORKDIR = FLAGS.string('workdir', '', 'The run to score.')
_TOKENIZER = FLAGS.string(
  'tokenizer', '', 'Workdir of the tokenizer that decodes for a generator.'
)


def main() -> None:
  """Scores a run."""
  cli.require(workdir=_WORKDIR.value)
  files.check_folder('workdir', _WORKDIR.value)
  cli.start_jax()
  found = score.score_run(_CONFIG.value, _WORKDIR.value, _TOKENIZER.value)
  rows = [
    {
      'metric': s.metric,
      'value': s.value,
      'protocol': scores.in_words(s.protocol),
    }
    for s in found
  ]
  cli.say(tables.table(rows, ['metric', 'value', 'protocol']))
  cli.say(json.dumps([dataclasses.asdict(score) for score in found]))


if __name__ == '__main__':
  cli.run(main, FLAGS)
