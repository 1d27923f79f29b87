r"""Writes a page about runs: pictures, scores, costs, curves, the paper.

  python -m launch.report --runs=runs/tok,runs/gen --tokenizer=runs/tok_big \
    --out=runs/report

Writes report.html, which can be sent alone, and report.md with its pictures.
The same held-out pictures are reconstructed by all tokenizers. Scores are those
that launch.evaluate left in the workdirs or wrote elsewhere with --out.
"""

from launch import cli
from selfboottok_jax import files
from selfboottok_jax.evaluation import report
from selfboottok_jax.stages import page

FLAGS = cli.Flags()
_RUNS = FLAGS.strings('runs', [], 'Workdirs, as runs/tok,runs/gen.')
_TOKENIZER = FLAGS.string(
  'tokenizer',
  '',
  'Workdir of the tokenizer that decodes for generators; by default the one '
  'that a generator was trained on, if it is among --runs.',
)
_PICTURES = FLAGS.string(
  'pictures',
  '',
  'Photographs whose held-out part is reconstructed; by default those of the '
  'first run whose photographs are at hand.',
)
_OUT = FLAGS.string('out', '', 'Folder for report.html and report.md.')
_TITLE = FLAGS.string('title', 'SelfBootTok runs', 'Title of the page.')
_PER_CLASS = FLAGS.integer('per_class', 8, 'Samples of each class, 0 for none.')
_SEED = FLAGS.integer('seed', 1, 'Seed of the samples.')


def main() -> None:
  """Writes the page."""
  cli.require(runs=_RUNS.value, out=_OUT.value)
  for flag, least in ((_PER_CLASS, 0), (_SEED, 0)):
    cli.check_least(flag, least)
  files.check_folder('out', _OUT.value)
  report.check_dependencies()
  cli.start_jax()
  written = page.make_page(
    page.short_names(_RUNS.value),
    tokenizer=_TOKENIZER.value,
    pictures=_PICTURES.value,
    title=_TITLE.value,
    per_class=_PER_CLASS.value,
    seed=_SEED.value,
  )
  cli.say(f'{report.write_report(written, _OUT.value)} written')


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
