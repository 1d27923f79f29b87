"""What launch.report shows of the runs in a list of folders."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from selfboottok_jax import data, errors, files, inference, sizes
from selfboottok_jax.evaluation import (
  ablation,
  comparisons,
  cost,
  evaluate,
  report,
)
from selfboottok_jax.evaluation import scores as scores_lib
from selfboottok_jax.presets import ablations as presets
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import logging as logging_lib

# Pictures that are reconstructed and shown.
SHOWN = 8

Configs = Mapping[str, Mapping[str, Any]]


def make_page(
  workdirs: Mapping[str, str],
  *,
  tokenizer: str = '',
  pictures: str = '',
  title: str = 'SelfBootTok runs',
  per_class: int = 8,
  seed: int = 1,
  notes: Sequence[str] = (),
) -> report.Report:
  """Reads runs back, reconstructs with the tokenizers, samples the generators.

  What is not at hand, photographs or a tokenizer, leaves a note on the page.

  Args:
    workdirs: of the runs, by the name that the page has for each; folders of
      launch.ablate are shown as their tables.
    tokenizer: workdir of the tokenizer that decodes for generators; '' takes
      the one that a generator was trained on, if it is among the runs.
    pictures: held-out pictures to reconstruct, in any form of photographs; ''
      takes those of the first run whose pictures are at hand.
    title: of the page.
    per_class: samples of each class; 0 for none.
    seed: of the samples.
    notes: sentences for the reader, before those on what is not at hand.

  Raises:
    UserError: a folder that is no run, `pictures` that cannot be read, or a
      `tokenizer` that does not decode for a generator.
  """
  ablations, workdirs = _ablations(workdirs)
  configs = {
    name: checkpointing.read_config(workdir, '--runs')
    for name, workdir in workdirs.items()
  }
  found = {name: evaluate.read_scores(path) for name, path in workdirs.items()}
  told = list(notes)
  compared = _compare(workdirs, configs, pictures, told)
  samples = _sample(workdirs, configs, tokenizer, per_class, seed, told)
  decoders = {
    name: _name_of(tokenizer or config['tokenizer'], workdirs)
    for name, config in configs.items()
    if config['task'] == 'generator'
  }
  return report.Report(
    title=title,
    created=report.timestamp(),
    environment=report.environment(),
    configs=configs,
    runs=[
      read_run(name, workdirs[name], config) for name, config in configs.items()
    ],
    decoders={name: by for name, by in decoders.items() if by},
    stages=_stages(configs, workdirs, found),
    comparisons=compared,
    samples=samples,
    scores=[
      scores_lib.Score(name, s.metric, s.value, s.protocol)
      for name, of_run in found.items()
      for s in of_run
    ],
    ablations=ablations,
    # Imported runs have no card.
    costs={
      name: cost.read(workdir)
      for name, workdir in workdirs.items()
      if files.exists(files.as_path(workdir) / cost.FILE)
    },
    notes=told,
    has_paper=True,
  )


def _ablations(
  workdirs: Mapping[str, str],
) -> tuple[list[tuple[str, list[ablation.Filled]]], dict[str, str]]:
  """Reads the tables of folders that launch.ablate filled.

  Returns:
    The tables by folder, and the other folders.
  """
  shown, others = [], {}
  for name, workdir in workdirs.items():
    values = ablation.read(workdir)
    if not values:
      others[name] = workdir
      continue
    tables = [
      ablation.Table(
        table,
        title,
        {row.name: row.title for row in presets.ROWS if row.table == table},
      )
      for table, title in presets.TABLES.items()
      if any(value.table == table for value in values)
    ]
    shown.append((name, [ablation.fill(t, values, {}) for t in tables]))
  return shown, others


def read_run(name: str, workdir: str, config: Mapping[str, Any]) -> report.Run:
  """Reads what a page tells of a run; one without a checkpoint has 0 steps."""
  path = files.as_path(workdir) / logging_lib.METRICS
  return report.Run(
    name,
    workdir,
    config['task'],
    checkpointing.latest_step(workdir) or 0,
    logging_lib.seconds(path) if files.exists(path) else 0,
    path if files.exists(path) else None,
  )


def short_names(workdirs: Iterable[str]) -> dict[str, str]:
  """Names folders by the last parts of their paths that tell them apart.

  Folders that are given twice are named once.

  Returns:
    The folders by name, in their order.
  """
  distinct: dict[str, str] = {}
  for workdir in workdirs:
    distinct.setdefault(_canonical(workdir), workdir)
  parts = [path.rstrip('/').split('/') for path in distinct]
  names = []
  for own in parts:
    for count in range(1, len(own) + 1):
      if sum(other[-count:] == own[-count:] for other in parts) == 1:
        break
    names.append('/'.join(own[-count:]))
  return dict(zip(names, distinct.values(), strict=True))


def _sentence(error: Exception) -> str:
  return f'{error}'.rstrip('.') + '.'


def _canonical(workdir: str) -> str:
  return workdir if '://' in workdir else os.path.realpath(workdir)


def _name_of(workdir: str, workdirs: Mapping[str, str]) -> str:
  """The name of a run on the page; '' if it is not there."""
  named = {_canonical(path): name for name, path in workdirs.items()}
  return named.get(_canonical(workdir), '') if workdir else ''


def _stages(
  configs: Configs,
  workdirs: Mapping[str, str],
  found: Mapping[str, Sequence[scores_lib.Score]],
) -> list[tuple[str, float]]:
  """(run, PSNR) of a stage 1 and of those that scaled its aligner, if scored.

  Stages of several tokenizers would not continue each other: () then.
  """
  bases = {
    name: _name_of(config['tokenizer'], workdirs)
    for name, config in configs.items()
    if config['task'] == 'scaling'
  }
  if '' in bases.values() or len(set(bases.values())) != 1:
    return []
  psnrs = {
    name: [s.value for s in of_run if s.metric == 'psnr']
    for name, of_run in found.items()
  }
  chain = dict.fromkeys((*bases.values(), *bases))
  return [(name, psnrs[name][-1]) for name in chain if psnrs[name]]


def _compare(
  workdirs: Mapping[str, str], configs: Configs, pictures: str, told: list[str]
) -> list[comparisons.Comparison]:
  """Reconstructs the same pictures with all tokenizers of a size."""
  by_size: dict[sizes.Size, list[str]] = {}
  tokenizers = [n for n, c in configs.items() if c['task'] != 'generator']
  for name in tokenizers:
    if checkpointing.latest_step(workdirs[name]) is None:
      told.append(f'{name} has no checkpoint yet, and no reconstructions.')
      continue
    size = sizes.canonical(configs[name]['data']['image_size'])
    by_size.setdefault(size, []).append(name)
  compared = []
  for size, names in by_size.items():
    # The same pictures at every size.
    opened = _open(tokenizers, configs, pictures, size)
    if isinstance(opened, str):
      told += [opened] if opened not in told else []
      continue
    originals, source = opened
    loaded = {name: inference.load_tokenizer(workdirs[name]) for name in names}
    compared.append(comparisons.compare(originals, loaded, source))
  return compared


def _open(
  names: Sequence[str], configs: Configs, pictures: str, size: sizes.Size
) -> tuple[UInt8[np.ndarray, 'm h w 3'], str] | str:
  """Reads held-out pictures of the first run that has any at hand.

  Returns:
    The pictures and their source, or a sentence on what is missing.
  """
  if pictures:
    return _read('auto', pictures, data.Options(), 'stop', size)
  reasons = {}
  for name in names:
    section = configs[name]['data']
    # As the training read them: earlier versions ignored the orientation.
    options = data.Options(
      section.get('exif', False),
      section.get('max_pixels', data.Options().max_pixels),
    )
    bad = section.get('bad', 'stop')
    try:
      return _read(section['source'], section['path'], options, bad, size)
    except (errors.UserError, OSError) as error:
      reasons[_sentence(error)] = name
  told = ' '.join(f'{name}: {reason}' for reason, name in reasons.items())
  return (
    'No reconstructions, as no held-out pictures are at hand; name some with '
    f'--pictures=PHOTOS. {told}'
  )


def _read(
  kind: str, path: str, options: data.Options, bad: str, size: sizes.Size
) -> tuple[UInt8[np.ndarray, 'm h w 3'], str]:
  """Centre crops of pictures spread over a validation split, and their name."""
  source = data.open_source(kind, path, 'val', size, options=options, bad=bad)
  batches = data.make_eval_dataset(
    source,
    batch_size=SHOWN,
    image_size=size,
    num_images=SHOWN,
    process_index=0,
    process_count=1,
  )
  batch = next(iter(batches))
  return np.asarray(batch['image'])[batch['mask']], repr(source)


def _sample(
  workdirs: Mapping[str, str],
  configs: Configs,
  tokenizer: str,
  per_class: int,
  seed: int,
  told: list[str],
) -> list[report.Samples]:
  """Samples each generator for which a tokenizer is at hand."""
  samples = []
  for name, config in configs.items():
    if config['task'] != 'generator' or not per_class:
      continue
    decoder = tokenizer or config['tokenizer']
    named = _name_of(decoder, workdirs)
    if not (named or tokenizer):
      told.append(
        f'No samples of {name}: neither --tokenizer nor a run among --runs '
        'decodes for it.'
      )
      continue
    try:
      generator = inference.load_generator(workdirs[name], tokenizer=decoder)
    except errors.UserError as error:
      # Nobody said that a run of the page decodes for this generator.
      if tokenizer:
        raise
      told.append(f'No samples of {name}: {_sentence(error)}')
      continue
    samples.append(
      report.draw_samples(
        name, generator, per_class, seed=seed, decoded_by=named or decoder
      )
    )
  return samples
