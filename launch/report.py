r"""Writes a page about runs: curves, scores, costs and samples of each class.

  python -m launch.report --runs=runs/tok,runs/gen --tokenizer=runs/tok_big \
    --out=runs/report

Scores are those that launch.evaluate left in the workdirs; --tokenizer decodes
the samples of a generator.
"""

from launch import cli
from selfboottok_jax import files
from selfboottok_jax.evaluation import report

FLAGS = cli.Flags()
_RUNS = FLAGS.strings('runs', [], 'Workdirs, as runs/tok,runs/gen.')
_TOKENIZER = FLAGS.string(
  'tokenizer', '', 'Workdir of the tokenizer that decodes for a generator.'
)
_OUT = FLAGS.string('out', '', 'Folder for report.html.')
_TITLE = FLAGS.string('title', 'SelfBootTok runs', 'Title of the page.')
_PER_CLASS = FLAGS.integer('per_class', 8, 'Samples of each class.')
_SEED = FLAGS.integer('seed', 1, 'Seed of the samples.')


def main() -> None:
  """Writes the page."""
  cli.require(runs=_RUNS.value, out=_OUT.value)
  for flag, least in ((_PER_CLASS, 1), (_SEED, 0)):
    cli.check_least(flag, least)
  files.check_folder('out', _OUT.value)
  report.check_dependencies()
  cli.start_jax()
  page = report.make_page(
    _RUNS.value,
    tokenizer=_TOKENIZER.value,
    title=_TITLE.value,
    per_class=_PER_CLASS.value,
    seed=_SEED.value,
  )
  cli.say(f'{report.write_report(page, _OUT.value)} written')


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
