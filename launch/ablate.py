r"""Trains and scores the rows of a table, and fills it.

  python -m launch.ablate --rows=table3 --base=photos64 \
    --config.data.path=PHOTOS --workdir=runs/table3 --seeds=0,1

--list has all rows. Runs are launch.train's, below --workdir; those that rows
share are trained once. A command that was stopped, or a row that failed, goes
on when the same command is given again. Writes ablation.html, ablation.md and
ablation.json.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from launch import cli
from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import ablation as tables_lib
from selfboottok_jax.evaluation import evaluate, report, tables
from selfboottok_jax.evaluation import metrics as metrics_lib
from selfboottok_jax.presets import ablations
from selfboottok_jax.stages import ablation, ablation_cost, inputs, jobs
from selfboottok_jax.training import checkpointing

FLAGS = cli.Flags()
# By its place: the command works in any folder.
_CONFIG = FLAGS.config(ablations.__file__)
_ROWS = FLAGS.strings('rows', [], 'Tables or rows, as table3,controls/long.')
_BASE = FLAGS.choice(
  'base', 'photos64', ablations.BASES, 'What the rows are changes of.'
)
_WORKDIR = FLAGS.string('workdir', '', 'Folder of the runs and the tables.')
_SEEDS = FLAGS.strings('seeds', ['0'], 'Seeds; every row is trained with each.')
_BUDGET = FLAGS.number('budget', 1.0, 'Multiplies the steps of every training.')
_MORE_DATA = FLAGS.string(
  'more_data', '', 'Images of stage 2 in the row data/more.'
)
_METRICS = FLAGS.strings(
  'metrics', [], "What is scored, as rfid,psnr,fid; launch.evaluate's default."
)
_REFERENCE = FLAGS.string(
  'reference', '', 'What samples are compared with; those held out.'
)
_VALIDATION = FLAGS.string(
  'validation', '', 'Real images that --reference has not, for fdr.'
)
_JOBS = FLAGS.integer(
  'jobs', 0, 'Commands at a time; 0 is one for each accelerator.'
)
_LIST = FLAGS.switch('list', False, 'Print all rows, and do nothing else.')
_DRY_RUN = FLAGS.switch(
  'dry_run', False, 'Check the rows and print the commands; run nothing.'
)
_COST = FLAGS.switch(
  'cost', False, 'Print what a generator for all sizes saves, and stop.'
)

# Commands and configurations stand side by side.
_ROOT = pathlib.Path(cli.__file__).parents[1]
SETTINGS = 'settings.json'
FDR = 'fdr'
# Metrics that compare samples with a reference; fd_NETWORK is of
# reconstructions too.
SAMPLES_ALONE = (
  *('fid', 'sfid', 'is', 'precision', 'recall', 'prec_recall', FDR),
  metrics_lib.BASELINE,
)
EITHER = 'fd_'


def main() -> None:
  """Trains, scores and fills the tables."""
  if _LIST.value:
    cli.say(_listing())
    return
  settings = ablation.Settings(
    _BASE.value, _CONFIG.overrides, _BUDGET.value, _MORE_DATA.value
  )
  # Accelerators belong to the commands that are started.
  jax.config.update('jax_platforms', 'cpu')
  if _COST.value:
    cli.say(ablation_cost.page(ablation_cost.account(settings)))
    return
  cli.require(rows=_ROWS.value)
  if not _DRY_RUN.value:
    cli.require(workdir=_WORKDIR.value)
  if _METRICS.present:
    metrics_lib.parse(_METRICS.value)
  _check_references()
  rows = ablations.choose(_ROWS.value)
  seeds = _read_seeds()
  cli.check_least(_JOBS, 0)
  places = jobs.share_devices(_JOBS.value)
  report.check_dependencies()
  workdir = files.local_path(
    '--workdir', _WORKDIR.value or 'WORKDIR', 'it holds locks and logs'
  )
  plans = [ablation.plan(row, settings) for row in rows]
  ablation.check_changes(plans, settings)
  ablation.check(plans)
  table = _Ablation(workdir, settings, plans, seeds)
  if _DRY_RUN.value:
    cli.say('\n'.join(str(job) for job in table.commands()))
    return
  # They name their images, and these can be opened.
  inputs.open_data(plans[0].tokenizer.config, 'train')
  files.check_folder('workdir', workdir)
  _check_settings(workdir, settings)
  with jobs.locked(workdir) as lock:
    _keep_settings(workdir, settings)
    table.write()
    failed = jobs.run(
      table.commands(),
      workdir / 'logs',
      [place | {'PYTHONPATH': _python_path()} for place in places],
      say=cli.say,
      on_end=table.note,
      kept=lock,
    )
  table.write()
  cli.say(f'{workdir / tables_lib.NAME}.html written')
  if failed:
    lost = sorted({row for of in table.failures.values() for row in of})
    raise errors.UserError(
      f'{len(failed)} commands of {", ".join(lost)} failed; {workdir}/'
      f'{tables_lib.NAME}.md says why, and the same command tries them again'
    )


class _Ablation:
  """The commands of the rows, and what came of them."""

  def __init__(
    self,
    workdir: pathlib.Path,
    settings: ablation.Settings,
    plans: Sequence[ablation.Plan],
    seeds: Sequence[int],
  ):
    """Names the runs; nothing is written."""
    self._workdir, self._settings = workdir, settings
    self._plans, self._seeds = plans, seeds
    self._names = ablation.name_trainings(plans, settings)
    # Rows by name of the jobs that they need.
    self._needed_by: dict[str, list[ablations.Row]] = {}
    self._scores: dict[tuple[str, int, str], pathlib.Path] = {}
    self._jobs = self._make_jobs()
    self.failures: dict[str, dict[str, str]] = {}

  def commands(self) -> list[jobs.Job]:
    """All commands, each once and after those that it needs."""
    return list(self._jobs.values())

  def note(self, job: jobs.Job, reason: str) -> None:
    """Writes the tables anew when a score or a failure is there."""
    if reason:
      for row in self._needed_by[job.name]:
        self.failures.setdefault(row.table, {}).setdefault(row.name, reason)
    if reason or job.module != 'launch.train':
      self.write()

  def write(self) -> None:
    """Writes the tables with the scores that there are."""
    values = [
      value
      for plan in self._plans
      for seed in self._seeds
      for value in self._values(plan, seed)
    ]
    chosen = {plan.row.table for plan in self._plans}
    to_fill = [
      tables_lib.Table(
        name,
        title,
        {row.name: row.title for row in ablations.ROWS if row.table == name},
        ablation_cost.saved_by_sharing(
          [plan for plan in self._plans if plan.row.table == name]
        ),
      )
      for name, title in ablations.TABLES.items()
      if name in chosen
    ]
    tables_lib.write(
      self._workdir,
      f'Ablations at {self._settings.base}',
      self._about(),
      to_fill,
      values,
      self.failures,
    )

  def _about(self) -> list[str]:
    changes = [f'{k}={v}' for k, v in self._settings.changes.items()]
    about = [
      f'Base {self._settings.base}, budget {self._settings.budget:g}, seeds '
      f'{", ".join(map(str, self._seeds))}.',
      'Numbers are the mean over seeds ± the sample standard deviation. The '
      "paper's are of ImageNet at 256 pixels and of its own budget.",
      'A row counts the cost of all trainings that it needs, those that it '
      'shares with other rows too.',
    ]
    return [*about, f'Changed for all rows: {", ".join(changes)}.'][
      : 3 + bool(changes)
    ]

  def _make_jobs(self) -> dict[str, jobs.Job]:
    made: dict[str, jobs.Job] = {}

    def add(job: jobs.Job, row: ablations.Row) -> None:
      made.setdefault(job.name, job)
      self._needed_by.setdefault(job.name, []).append(row)

    for seed in self._seeds:
      for plan in self._plans:
        for training in plan.trainings:
          add(self._train(training, seed), plan.row)
        for job in self._evaluate(plan, seed):
          add(job, plan.row)
    return made

  def _name(self, training: ablation.Training, seed: int) -> str:
    return f'{self._names[training]}_seed{seed}'

  def _run(self, training: ablation.Training, seed: int) -> pathlib.Path:
    return self._workdir / 'runs' / self._name(training, seed)

  def _train(self, training: ablation.Training, seed: int) -> jobs.Job:
    run = self._run(training, seed)
    changes = {**dict(training.changes), 'train.seed': seed}
    needs = []
    if training.tokenizer is not None:
      needs = [self._name(training.tokenizer, seed)]
      changes['tokenizer'] = str(self._run(training.tokenizer, seed))
    config = _config_file(f'{training.stage}.py')
    return jobs.Job(
      self._name(training, seed),
      'launch.train',
      [
        f'--config={config}:{training.preset}',
        *_as_flags(changes),
        f'--workdir={run}',
      ],
      needs,
      lambda: _is_trained(run, training),
    )

  def _evaluate(self, plan: ablation.Plan, seed: int) -> list[jobs.Job]:
    """The scoring of reconstructions and, with a generator, of samples."""
    scored = self._name(plan.scored, seed)
    made = [
      self._score(
        plan, seed, tables_lib.RECONSTRUCTIONS, scored, [scored], plan.scored
      )
    ]
    if plan.generator is not None:
      name = f'{self._name(plan.generator, seed)}_by_{scored}'
      needs = [self._name(plan.generator, seed), scored]
      made.append(
        self._score(plan, seed, tables_lib.SAMPLES, name, needs, plan.generator)
      )
    found = [job for job in made if job is not None]
    if not found:
      raise errors.ConfigError(
        f'--metrics={",".join(_METRICS.value)} has nothing for '
        f'{plan.row.path}, which trains no generator; add one of '
        'reconstructions, as psnr'
      )
    return found

  def _score(
    self,
    plan: ablation.Plan,
    seed: int,
    of: str,
    name: str,
    needs: Sequence[str],
    training: ablation.Training,
  ) -> jobs.Job | None:
    """A launch.evaluate; None if --metrics has nothing of the kind."""
    metrics = _metrics_of(of)
    if _METRICS.value and not metrics:
      return None
    changes = _evaluate_changes(self._settings, plan)
    has_reference = of == tables_lib.SAMPLES and bool(_REFERENCE.value)
    if has_reference:
      # It takes the place of these images.
      for key in ('data.path', 'data.source', 'data.num_images'):
        changes.pop(key, None)
    how = _as_flags(changes)
    if metrics:
      how.append(f'--metrics={",".join(metrics)}')
    if has_reference:
      how.append(f'--reference={_REFERENCE.value}')
      how += [f'--validation={_VALIDATION.value}'] * bool(_VALIDATION.value)
    run = self._run(training, seed)
    # Other metrics of the same run are another file.
    key = hashlib.sha256(json.dumps(how).encode()).hexdigest()[:8]
    out = self._workdir / 'scores' / f'{name}_{of}_{key}.json'
    self._scores[plan.row.path, seed, of] = out
    tokenizer = []
    if of == tables_lib.SAMPLES:
      tokenizer = [f'--tokenizer={self._run(plan.scored, seed)}']
    return jobs.Job(
      f'{name}_{of}',
      'launch.evaluate',
      [f'--workdir={run}', *tokenizer, *how, f'--out={out}'],
      needs,
      lambda: bool(evaluate.read_file(out)),
    )

  def _values(self, plan: ablation.Plan, seed: int) -> list[tables_lib.Value]:
    """The scores of a row that there are, and its cost once it is trained."""
    row = plan.row
    found = []
    for of in (tables_lib.SAMPLES, tables_lib.RECONSTRUCTIONS):
      path = self._scores.get((row.path, seed, of))
      for score in evaluate.read_file(path) if path else []:
        found.append((of, score.metric, score.value, dict(score.protocol)))
    if found and all(
      _is_trained(self._run(t, seed), t) for t in plan.trainings
    ):
      runs = {t: self._run(t, seed) for t in plan.trainings}
      for metric, (value, how) in ablation_cost.measure(plan, runs).items():
        found.append((tables_lib.COST, metric, value, {'description': how}))
    return [
      tables_lib.Value(
        row.table, row.name, row.title, seed, metric, of, value, protocol
      )
      for of, metric, value, protocol in found
    ]


def _listing() -> str:
  """All rows, as text."""
  return tables.table(
    [
      {
        'row': row.path,
        'title': row.title,
        'trained': ', '.join(row.stages)
        + (f' ({row.aligner})' if row.aligner else ''),
        'changes': ', '.join(ablation.describe_changes(row)),
      }
      for row in ablations.ROWS
    ],
    ['row', 'title', 'trained', 'changes'],
  )


def _read_seeds() -> list[int]:
  texts = _SEEDS.value
  if not texts or not all(text.strip().isdecimal() for text in texts):
    raise errors.ConfigError(
      f'--seeds={",".join(texts)}; wanted whole numbers from 0, as 0,1,2'
    )
  return sorted({int(text) for text in texts})


def _metrics_of(of: str) -> list[str]:
  """The --metrics that reconstructions, or samples, can have."""
  return [
    text
    for text in _METRICS.value
    if text.startswith(EITHER)
    or (text.partition(':')[0] in SAMPLES_ALONE) == (of == tables_lib.SAMPLES)
  ]


def _check_references() -> None:
  """Raises ConfigError for references that a metric lacks, or none reads."""
  wants_ratio = FDR in _METRICS.value
  if wants_ratio and not (_REFERENCE.value and _VALIDATION.value):
    raise errors.ConfigError(
      f'--metrics={",".join(_METRICS.value)} without --reference and '
      f'--validation; {FDR} divides by the distance of real images from others'
    )
  if _VALIDATION.value and not wants_ratio:
    raise errors.ConfigError(
      f'--validation={_VALIDATION.value} is for {FDR} alone; leave it out, or '
      f'add {FDR} to --metrics'
    )


def _evaluate_changes(
  settings: ablation.Settings, plan: ablation.Plan
) -> dict[str, Any]:
  """Keys of launch.evaluate: the images of stage 1, and the user's own.

  Stage 2 and the generator may be trained on others, and rows are scored on the
  same.
  """
  changes, given = settings.changes, plan.tokenizer.config.data
  if plan.row.more_data and not given.path:
    raise errors.ConfigError(
      f'{plan.row.path} with stage 1 on built-in scenes, and its stage 2 is '
      'of photographs; give --config.data.path, so that both can be scored'
    )
  images = {}
  if given.path:
    images = {'data.path': given.path, 'data.source': given.source}
  prefix = 'evaluate.'
  own = {
    k.removeprefix(prefix): v
    for k, v in changes.items()
    if k.startswith(prefix)
  }
  scales = own.get('guidance_scales', ())
  if len(scales) > 1:
    # They would be taken for values of several seeds.
    raise errors.ConfigError(
      f'--config.evaluate.guidance_scales={scales}; wanted one scale for a '
      'table, and a folder for each'
    )
  return images | own


def _as_flags(changes: Mapping[str, Any]) -> list[str]:
  return [f'--config.{key}={value}' for key, value in changes.items()]


def _config_file(name: str) -> str:
  """The path of a configuration, as short as it can be."""
  path = _ROOT / 'configs' / name
  here = pathlib.Path.cwd()
  return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _python_path() -> str:
  """PYTHONPATH for the commands, so that they import this same checkout."""
  given = os.environ.get('PYTHONPATH')
  return os.pathsep.join([str(_ROOT), *([given] if given else [])])


def _is_trained(run: pathlib.Path, training: ablation.Training) -> bool:
  return checkpointing.latest_step(str(run)) == training.config.train.steps


def _settings_of(settings: ablation.Settings) -> dict[str, Any]:
  """The settings that are fixed for a folder once it holds runs."""
  changes = {
    key: value
    for key, value in settings.changes.items()
    if not key.startswith('evaluate.')
  }
  return json.loads(
    json.dumps(
      {
        'base': settings.base,
        'budget': settings.budget,
        'more_data': settings.more_data,
        'changes': changes,
      }
    )
  )


def _check_settings(workdir: pathlib.Path, settings: ablation.Settings) -> None:
  """Raises ConfigError if the folder holds an ablation of other settings."""
  path = workdir / SETTINGS
  if not path.exists():
    return
  given = _settings_of(settings)
  try:
    stored = dict(json.loads(path.read_text()))
  except (ValueError, TypeError) as error:
    raise errors.UserError(
      f'{path} is damaged; choose another --workdir, or put the file back'
    ) from error
  for name, value in given.items():
    if stored.get(name) != value:
      raise errors.ConfigError(
        f'--workdir={workdir} holds rows of {name}={stored.get(name)}, and '
        f'{value} was given; choose another --workdir, or the same values'
      )


def _keep_settings(workdir: pathlib.Path, settings: ablation.Settings) -> None:
  files.write_json(workdir / SETTINGS, _settings_of(settings))


if __name__ == '__main__':
  cli.run(main, FLAGS)
