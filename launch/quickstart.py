"""The whole pipeline on built-in scenes, on a laptop, in minutes.

  python -m launch.quickstart --workdir=runs/quickstart

Trains the SoftVQ baseline, SelfBootTok, a larger local aligner and a generator
of the global tokens; samples, scores, and writes report.html.
"""

import dataclasses
import math
import time

import ml_collections

from launch import cli
from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import report, tables
from selfboottok_jax.presets import evaluate as evaluate_config
from selfboottok_jax.presets import generator as generator_config
from selfboottok_jax.presets import scaling as scaling_config
from selfboottok_jax.presets import tokenizer as tokenizer_config
from selfboottok_jax.stages import page, score, train
from selfboottok_jax.training import checkpointing

FLAGS = cli.Flags()
_WORKDIR = FLAGS.string(
  'workdir', 'runs/quickstart', 'Folder of the runs and the report.'
)
_BUDGET = FLAGS.number('budget', 1.0, 'Multiplies the steps of every training.')

BASELINE, STAGE1 = 'SoftVQ baseline', 'SelfBootTok, stage 1'
STAGE2, GENERATOR = 'Stage 2, larger aligner', 'Generator'
FOLDERS = {
  BASELINE: 'softvq',
  STAGE1: 'tokenizer',
  STAGE2: 'scaled',
  GENERATOR: 'generator',
}
SAMPLES_PER_CLASS = 4
FRECHET_SAMPLES = 500
METRICS = ('psnr', 'ssim', 'ssim_range2', 'fd_hog', 'usage', 'perplexity')
SAMPLE_METRICS = ('fd_hog', 'gaussian_codes')


def main() -> None:
  """Runs everything, or what is left of it after a stop."""
  if not 0 < _BUDGET.value < math.inf:
    raise errors.ConfigError(
      f'--budget={_BUDGET.value}; wanted a number above 0, as 0.5'
    )
  files.check_folder('workdir', _WORKDIR.value)
  report.check_dependencies()
  cli.start_jax()
  workdir = files.as_path(_WORKDIR.value)
  began = time.monotonic()
  configs = _make_configs(workdir, _BUDGET.value)
  _check_budget(workdir, configs)
  for name, config in configs.items():
    train.train(config, str(workdir / FOLDERS[name]))
  written = _make_report(workdir)
  path = report.write_report(written, workdir)
  cli.say(
    tables.table(
      [
        {'run': s.run, 'metric': s.metric, 'value': s.value}
        for s in written.scores
        if not s.metric.startswith(('usage', 'perplexity'))
      ],
      ['run', 'metric', 'value'],
    )
  )
  for line in report.regressions(written.stages):
    cli.say(line)
  cli.say(f'{path} written after {tables.duration(time.monotonic() - began)}')


def _check_budget(
  workdir: files.Path, configs: dict[str, ml_collections.ConfigDict]
) -> None:
  """Raises ConfigError if the folder holds a quickstart of another length.

  The later runs began with stage 1 as it is: training it further would leave
  them with a tokenizer that no longer exists.
  """
  for name, config in configs.items():
    folder = workdir / FOLDERS[name]
    if not files.exists(folder / checkpointing.CONFIG):
      continue
    stored = checkpointing.read_config(str(folder), '--workdir')
    if stored['train']['steps'] != config.train.steps:
      raise errors.ConfigError(
        f'--workdir={workdir} holds a quickstart of another --budget '
        f'({FOLDERS[name]}: {stored["train"]["steps"]} steps there, '
        f'{config.train.steps} now); remove it, or choose another --workdir'
      )


def _make_configs(
  workdir: files.Path, budget: float
) -> dict[str, ml_collections.ConfigDict]:
  """The four trainings, in their order."""
  baseline = tokenizer_config.get_config('quickstart')
  baseline.model.local1d_width = 0
  baseline.model.local2d_depth = 0
  stage1 = tokenizer_config.get_config('quickstart')
  stage2 = scaling_config.get_config('quickstart')
  generator = generator_config.get_config('quickstart')
  # The generator is trained on stage 1's tokens and decoded by stage 2.
  stage2.tokenizer = generator.tokenizer = str(workdir / FOLDERS[STAGE1])
  configs = {
    BASELINE: baseline,
    STAGE1: stage1,
    STAGE2: stage2,
    GENERATOR: generator,
  }
  for config in configs.values():
    config.train.steps = max(2, round(budget * config.train.steps))
  return configs


def _make_report(workdir: files.Path) -> report.Report:
  """Reads the four runs back, scores them and collects the page."""
  config = evaluate_config.get_config()
  trained = tokenizer_config.get_config('quickstart')
  config.data.num_images = trained.evaluation.num_images
  config.num_samples = FRECHET_SAMPLES
  measured = []
  for name, folder in FOLDERS.items():
    is_generator = name == GENERATOR
    measured += score.score_run(
      config,
      workdir / folder,
      workdir / FOLDERS[STAGE2] if is_generator else '',
      request=score.Request(SAMPLE_METRICS if is_generator else METRICS),
    )
  made = page.make_page(
    {name: str(workdir / folder) for name, folder in FOLDERS.items()},
    tokenizer=str(workdir / FOLDERS[STAGE2]),
    title='SelfBootTok quickstart',
    per_class=SAMPLES_PER_CLASS,
    notes=[
      'Built-in scenes and weight-free teachers (hog, dct) show that every '
      'stage works; they say nothing about photographs.',
      'The generator never saw the larger aligner: it was trained on the '
      "global tokens of stage 1, and stage 2's decoder turned its samples "
      'into pixels.',
    ],
  )
  psnrs = [s.value for s in measured if s.metric == 'psnr']
  stages = list(zip((BASELINE, STAGE1, STAGE2), psnrs, strict=True))
  return dataclasses.replace(made, stages=stages)


if __name__ == '__main__':
  cli.run(main, FLAGS)
