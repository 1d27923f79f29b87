r"""A page about runs: curves, scores, costs and samples of each class.

  python -m launch.report --runs=runs/tok,runs/gen --tokenizer=runs/tok_big \
    --out=runs/report

Scores are those that launch.evaluate left in the workdirs; --tokenizer decodes
the samples of generators.
"""

import contextlib
import dataclasses
import datetime
import json
import pathlib

from absl import flags

from launch import cli, pages
from selfboottok_jax import errors, files, inference
from selfboottok_jax.evaluation import content, cost, evaluate, report
from selfboottok_jax.training import workdirs

_RUNS = flags.DEFINE_list('runs', None, 'Workdirs, as runs/tok,runs/gen.')
_TOKENIZER = flags.DEFINE_string(
  'tokenizer', None, 'Workdir of the tokenizer that decodes for a generator.'
)
_OUT = flags.DEFINE_string('out', None, 'Folder for report.html.')
_TITLE = flags.DEFINE_string('title', 'SelfBootTok runs', 'Of the page.')
_PER_CLASS = flags.DEFINE_integer('per_class', 8, 'Samples of each class.')
_SEED = flags.DEFINE_integer('seed', 1, 'Seed of the samples.')


def main(argv) -> None:
  """Writes the page that the flags ask for."""
  del argv
  cli.require(runs=_RUNS.value, out=_OUT.value)
  for name, value, least in (
    ('per_class', _PER_CLASS.value, 1),
    ('seed', _SEED.value, 0),
  ):
    if value < least:
      raise errors.ConfigError(f'--{name}={value}; wanted {least} or more')
  files.check_folder('out', _OUT.value)
  cli.start_jax()
  path = report.write_report(make_page(_RUNS.value), _OUT.value)
  cli.say(f'{path} written')


def make_page(names: list[str]) -> content.Report:
  """Reads runs back, and samples from the generators among them."""
  folders = {name: pathlib.Path(name) for name in dict.fromkeys(names)}
  configs = {name: workdirs.read_config(name, '--runs') for name in folders}
  generators = [
    name for name, config in configs.items() if config['task'] == 'generator'
  ]
  if len(generators) > 1:
    raise errors.ConfigError(
      f'--runs has {len(generators)} generators ({", ".join(generators)}), and '
      'a page shows the samples of one; wanted a page for each'
    )
  samples = None
  if generators:
    cli.require(tokenizer=_TOKENIZER.value)
    samples = _samples(generators[0])
  cards = {}
  for name, folder in folders.items():
    # Imported runs have none.
    if (folder / cost.FILE).exists():
      cards[name] = cost.read(folder)
  return content.Report(
    title=_TITLE.value,
    created=datetime.datetime.now(datetime.UTC).strftime('%d %B %Y %H:%M UTC'),
    environment=pages.environment(),
    configs=configs,
    runs=[pages.run_of(path, name, '--runs') for name, path in folders.items()],
    samples=samples,
    scores=[score for path in folders.values() for score in _scores(path)],
    costs=cards,
  )


def _samples(workdir: str) -> content.Samples:
  generator = inference.load_generator(
    workdir, tokenizer=inference.load_tokenizer(_TOKENIZER.value)
  )
  return pages.samples_of(
    generator, _PER_CLASS.value, seed=_SEED.value, decoded_by=_TOKENIZER.value
  )


def _scores(folder: pathlib.Path) -> list[content.Score]:
  """What launch.evaluate left there."""
  path = folder / evaluate.SCORES
  if not path.exists():
    return []
  with contextlib.suppress(ValueError, TypeError, KeyError):
    known = {field.name for field in dataclasses.fields(content.Score)}
    return [
      content.Score(**{key: record[key] for key in known})
      for record in json.loads(path.read_text())
    ]
  raise errors.UserError(
    f'{path} is damaged; measure again with launch.evaluate --workdir={folder}'
  )


if __name__ == '__main__':
  cli.run(main, continues=False)
