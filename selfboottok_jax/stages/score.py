"""Scores of a run, of samples or of anybody's images.

How something is measured is in `evaluation`; here is what starts from a
configuration (presets/evaluate.py), from runs and from files.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from selfboottok_jax import data, errors, files, inference, pretrained, sizes
from selfboottok_jax.evaluation import (
  codes,
  evaluate,
  image_sets,
  measuring,
  paired,
  reconstruction_files,
  references,
  sample_folder,
  scores,
  transport_health,
)
from selfboottok_jax.evaluation import metrics as metrics_lib
from selfboottok_jax.models import aligners
from selfboottok_jax.stages import objective
from selfboottok_jax.training import checkpointing, processes, sharding

Given: TypeAlias = str | os.PathLike[str]
Config: TypeAlias = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Request:
  """The metrics that are wanted, and what images are compared with.

  Attributes:
    metrics: see `evaluation.metrics`; () for all that is possible with the
      weights on this machine.
    reference: real images, photographs or an .npz file of statistics or
      images; '' for a tokenizer's own originals or, for samples, the images of
      the configuration.
    validation: real images that the reference has not, for FDr alone.
  """

  metrics: Sequence[str] = ()
  reference: Given = ''
  validation: Given = ''

  def plan(
    self,
    what: str,
    *,
    has_pairs: bool = False,
    has_codes: bool = False,
    has_reference: bool = False,
    samples: bool = False,
    trained: Mapping[str, Any] | None = None,
  ) -> metrics_lib.Plan:
    """The metrics, checked against what there is; see `metrics.Plan.check`.

    Networks of the configuration `trained` with a source have this source.
    """
    specs = (trained or {}).get('networks', {}).values()
    # Random weights may train, but they measure nothing.
    sources = {
      spec.partition(':')[0]: spec
      for spec in specs
      if not spec.endswith(f':{pretrained.RANDOM}')
    }
    has_reference = has_reference or bool(self.reference)
    there = {
      'has_pairs': has_pairs,
      'has_codes': has_codes,
      'has_reference': has_reference,
      'samples': samples,
    }
    chosen = self.metrics or metrics_lib.defaults(sources, **there)
    if not chosen:
      raise errors.ConfigError(
        f'{what} with nothing to compare with; wanted --reference=PHOTOS or an '
        '.npz file, or --pairs=ORIGINALS'
      )
    plan = metrics_lib.parse(chosen, sources)
    validated = bool(self.validation) or (has_pairs and has_reference)
    plan.check(what, **there, has_validation=validated)
    return plan


def score_run(
  config: Config,
  workdir: Given,
  tokenizer: Given = '',
  *,
  request: Request | None = None,
  num_samples: int | None = None,
  step: int | None = None,
  ema: bool = True,
  out: Given = '',
  save_reconstructions: Given = '',
) -> list[scores.Score]:
  """Scores a tokenizer's reconstructions or a generator's samples.

  All processes must call this together; the first one writes.

  Args:
    config: that of `selfboottok_jax.get_config('evaluate')`.
    workdir: the run.
    tokenizer: workdir of the tokenizer that decodes for a generator.
    request: what to measure.
    num_samples: of a generator, those of `config` by default.
    step: the checkpoint, the newest by default.
    ema: False for the parameters themselves, not their running means.
    out: file for the scores; '' for scores.json in the workdir.
    save_reconstructions: new folder or .npz file for a tokenizer's
      reconstructions.

  Returns:
    A score per metric.

  Raises:
    UserError: the folder is no run, or what was given does not fit it.
  """
  workdir, tokenizer = os.fspath(workdir), os.fspath(tokenizer)
  request = request or Request()
  task = checkpointing.read_config(workdir, '--workdir')['task']
  with processes.all_or_none():
    check_out(out, workdir)
    if save_reconstructions:
      reconstruction_files.check(save_reconstructions, 'save_reconstructions')
  if task == 'generator':
    if not tokenizer:
      raise errors.ConfigError(
        f'--tokenizer not given; {workdir} is a generator, wanted the workdir '
        'of the tokenizer that decodes for it'
      )
    if save_reconstructions:
      raise errors.ConfigError(
        f'--save_reconstructions with {workdir}, which is a generator; wanted '
        'launch.sample, which writes its samples'
      )
    count = config.num_samples if num_samples is None else num_samples
    errors.require(count >= 2, 'num_samples', count, '2 or more')
    scales = _check_scales(config)
    generator = inference.load_generator(
      workdir, tokenizer=tokenizer, step=step, ema=ema
    )
    _check_same(generator, ema)
    found = score_generator(
      config,
      workdir,
      generator,
      [
        dataclasses.replace(generator.sampling, guidance_scale=scale)
        for scale in scales or (generator.sampling.guidance_scale,)
      ],
      sample_folder.make_labels(
        [config.labels],
        count,
        config.seed,
        generator.class_names or [str(i) for i in range(generator.num_classes)],
      ),
      labels_as=config.labels,
      request=request,
      ema=ema,
    )
  else:
    for flag, value in (
      ('tokenizer', tokenizer or None),
      ('num_samples', num_samples),
    ):
      if value is not None:
        raise errors.ConfigError(
          f'--{flag}={value} with {workdir}, which is a tokenizer itself; '
          'leave it out'
        )
    loaded = inference.load_tokenizer(workdir, step=step, ema=ema)
    _check_same(loaded, ema)
    found = score_tokenizer(
      config,
      workdir,
      loaded,
      request=request,
      ema=ema,
      save_reconstructions=save_reconstructions,
    )
  write(found, out, workdir)
  return found


def _check_same(
  loaded: inference.Tokenizer | inference.ImageGenerator, ema: bool
) -> None:
  """Raises ConfigError unless all processes loaded the same parameters."""
  if jax.process_count() > 1:
    processes.check_same('parameters', str(evaluate.parameters(loaded, ema)))


def score_tokenizer(
  config: Config,
  name: str,
  tokenizer: inference.Tokenizer,
  *,
  request: Request | None = None,
  ema: bool = True,
  save_reconstructions: Given = '',
) -> list[scores.Score]:
  """Scores a tokenizer that was loaded, under a name; see `score_run`."""
  # `load_tokenizer` may return either kind.
  if not isinstance(tokenizer, inference.ImageTokenizer):
    raise errors.UserError(
      f'{name} is a released autoencoder; wanted the workdir of a trained '
      'tokenizer'
    )
  request = request or Request()
  plan = request.plan(
    f'--workdir={name}',
    has_pairs=True,
    has_codes=True,
    trained=tokenizer.config,
  )
  health = None
  if transport_health.METRIC in plan.codes:
    health = _transport(name, tokenizer)
  mesh = sharding.make_mesh(fsdp=1)
  size = sizes.canonical(tokenizer.image_size)
  batches = _open_trained(config, tokenizer.config['data'], mesh)
  openers = _openers(config, request, size)
  openers['originals'] = functools.partial(
    references.of_batches, batches, image_size=size
  )
  measure = measuring.Measuring(
    plan, mesh, openers, image_size=size, convention=config.convention
  )
  reconstruct = measuring.Reconstructing(
    tokenizer, mesh, with_codes=bool(plan.codes), health=health
  )
  counted = codes.CodeStatistics(plan.codes)
  with contextlib.ExitStack() as stack:
    keep = None
    if save_reconstructions and jax.process_index() == 0:
      keep = stack.enter_context(
        reconstruction_files.writing(
          save_reconstructions, _names(batches), sizes.pair(size)
        )
      )
    for batch in batches:
      made, of_all = reconstruct(batch)
      measure.add(made)
      if plan.codes:
        counted.add(**of_all)
      if save_reconstructions:
        images = reconstruct.gather(made)
        if keep is not None:
          keep.add(images)
  common = {
    **_described(batches.source, batches.count),
    'crop': 'centre',
    **evaluate.parameters(tokenizer, ema),
  }
  found = measure.finish() + (counted.finish() if plan.codes else [])
  return _as_scores(name, found, common)


def _transport(
  name: str, tokenizer: inference.ImageTokenizer
) -> transport_health.Health:
  """What measures the transport of a run that was trained with it."""
  model, config = tokenizer.model, tokenizer.config
  goal = objective.Objective(**config.get('loss', {}))
  if 'transport' not in objective.active_terms(model, goal):
    raise errors.ConfigError(
      f'--metrics: {transport_health.METRIC} of {name}, which was trained '
      'without a transport loss; leave it out'
    )
  network = pretrained.load_network(
    config['networks']['transport'],
    patches=pretrained.Patches(
      model.image_size, model.patch_size, model.token_dim
    ),
  )
  head, of_head = None, tokenizer.heads.get('transport', {})
  if of_head:
    head = aligners.Projector(network.dim, goal.projector_width, model.dtype)
  return transport_health.Health(
    network, head, of_head, goal.ot_epsilon, goal.ot_iterations
  )


def score_generator(
  config: Config,
  name: str,
  generator: inference.ImageGenerator,
  sweep: Sequence[inference.Sampling],
  labels: Int[np.ndarray, ' n'],
  *,
  labels_as: str,
  request: Request | None = None,
  seed: int | None = None,
  rounding: str = 'truncate',
  ema: bool = True,
) -> list[scores.Score]:
  """Scores samples that are made for it and kept nowhere.

  Args:
    config: that of `selfboottok_jax.get_config('evaluate')`.
    name: name of the run, in the scores.
    generator: makes the samples; the processes share them.
    sweep: settings of sampling, each with scores of its own.
    labels: classes of all samples, by index.
    labels_as: the labels in words, for the protocol.
    request: what to measure.
    seed: of the noise; that of `config` by default.
    rounding: a key of `pixels.ROUNDINGS`.
    ema: what the generator was loaded with, for the protocol.
  """
  request = request or Request()
  seed = config.seed if seed is None else seed
  plan = request.plan(
    f'--workdir={name}',
    has_reference=True,
    samples=True,
    trained=generator.config,
  )
  mesh = sharding.make_mesh(fsdp=1)
  size = sizes.canonical(generator.tokenizer.image_size)
  openers = _openers(config, request, size)
  if request.reference:
    _check_unused(config, '--reference', ('path', 'source', 'num_images'))
  else:
    batches = _open_trained(config, generator.config['data'], mesh)
    openers['reference'] = functools.partial(
      references.of_batches, batches, image_size=size
    )
  measure = measuring.Measuring(
    plan, mesh, openers, image_size=size, convention=config.convention
  )
  decoder = generator.tokenizer
  common = {
    'labels': labels_as,
    'seed': seed,
    'rounding': rounding,
    **evaluate.parameters(generator, ema),
    'tokenizer_step': decoder.step,
    'tokenizer_weights': evaluate.parameters(decoder, True)['run_weights'],
  }
  shared = {
    'batch_size': config.data.batch_size,
    'seed': seed,
    'rounding': rounding,
  }
  found = []
  for sampling in sweep:
    measure.start()
    for batch in evaluate.samples_of(generator, labels, sampling, **shared):
      measure.add(batch)
    how = {'sampler': sampling.describe(), 'guidance': sampling.guidance_scale}
    found += _as_scores(name, measure.finish(), {**how, **common})
  if plan.has_baseline:
    measure.start()
    for batch in evaluate.gaussian_codes_of(generator, len(labels), **shared):
      measure.add(batch)
    found += [
      dataclasses.replace(score, metric=f'{score.metric}_gaussian_codes')
      for score in _as_scores(name, measure.finish(), {**_BASELINE, **common})
    ]
  return found


_BASELINE = {
  'description': 'baseline: decoded Gaussian codes of the right mean and '
  'deviation'
}


def score_samples(
  config: Config,
  samples: Given,
  *,
  pairs: Given = '',
  request: Request | None = None,
  out: Given = '',
) -> list[scores.Score]:
  """Scores images of any model, from a folder, a tar or an .npz file.

  All processes must call this together; the first one writes.

  Args:
    config: that of `selfboottok_jax.get_config('evaluate')`.
    samples: the images, see `image_sets.open_images`.
    pairs: their originals, for scores of reconstructions.
    request: what to measure.
    out: file for the scores; '' writes none.

  Raises:
    UserError: images that cannot be read or have no originals, or metrics that
      they do not allow.
  """
  request = request or Request()
  _check_unused(config, '--samples', ('path', 'source', 'num_images'))
  plan = request.plan(f'--samples={samples}', has_pairs=bool(pairs))
  with processes.all_or_none():
    check_out(out)
  mesh = sharding.make_mesh(fsdp=1)
  sharding.check_batch_size(config.data.batch_size, mesh, 'data.batch_size')
  split = config.data.split
  made = image_sets.open_images(samples, flag='samples', split=split)
  size = sizes.canonical(made.image_size)
  common: dict[str, Any] = {
    'samples': made.path,
    'samples_fingerprint': made.fingerprint[:12],
  }
  openers = _openers(config, request, size)
  rows, originals = np.arange(made.count), None
  if pairs:
    originals = image_sets.open_images(pairs, flag='pairs', split=split)
    of_originals = image_sets.pair(made, originals)
    if isinstance(made.source, data.PictureSource):
      # In the order of the originals, as a tokenizer's run has it. An .npz file
      # is read as it is.
      rows = np.argsort(of_originals, kind='stable')
      of_originals = of_originals[rows]
    common |= {
      'reference': originals.path,
      'reference_fingerprint': originals.fingerprint[:12],
      'reference_count': originals.count,
      'crop': 'centre',
    }
    openers['originals'] = functools.partial(
      _reference_of, originals, of_originals, config.data.batch_size, size
    )
  measure = measuring.Measuring(
    plan, mesh, openers, image_size=size, convention=config.convention
  )
  batch_size = config.data.batch_size
  images = made.batches(batch_size, rows=rows)
  beside = None
  if originals is not None:
    beside = originals.batches(batch_size, rows=of_originals, crop=size)
  for batch in _zipped(images, beside):
    measure.add(batch)
  found = _as_scores(made.path, measure.finish(), common)
  write(found, out)
  return found


def check_out(out: Given, workdir: Given = '') -> None:
  """Checks that scores can be written, before they are computed.

  Args:
    out: the file; '' for scores.json in the workdir.
    workdir: the run; '' if there is none.

  Raises:
    ConfigError: the file, or without one the workdir, cannot be written.
  """
  if out:
    files.check_file('out', out)
  elif workdir:
    try:
      files.check_folder('workdir', workdir)
    except errors.ConfigError as error:
      raise errors.ConfigError(
        f'--workdir={workdir} cannot be written; give --out=FILE for the scores'
      ) from error


def write(
  found: Sequence[scores.Score], out: Given = '', workdir: Given = ''
) -> None:
  """Writes scores, by the first process; all must call this.

  Scores in a file elsewhere are listed in the run, where that can be written.

  Args:
    found: the scores.
    out: the file; '' for scores.json in the workdir, beside what is there.
    workdir: the run; '' if there is none.
  """
  with processes.all_or_none():
    if jax.process_index() != 0:
      return
    if not out:
      if workdir:
        evaluate.add_scores(workdir, found)
      return
    evaluate.write_file(files.as_path(out), found)
    if workdir:
      with contextlib.suppress(errors.ConfigError):
        files.check_folder('workdir', workdir)
        evaluate.list_file(workdir, out)


def _check_unused(config: Config, flag: str, keys: Sequence[str]) -> None:
  """Raises ConfigError for keys of `data` that a flag takes the place of."""
  given = [f'data.{key}={config.data[key]}' for key in keys if config.data[key]]
  if given:
    raise errors.ConfigError(
      f'{", ".join(given)} with {flag}, which names the images; leave it out'
    )


def _openers(
  config: Config, request: Request, size: sizes.Size
) -> dict[str, measuring.Opener]:
  """What opens the references that a request names."""
  return {
    name: functools.partial(
      references.open_reference,
      path,
      image_size=size,
      batch_size=config.data.batch_size,
      split=config.data.split,
    )
    for name, path in (
      ('reference', request.reference),
      ('validation', request.validation),
    )
    if path
  }


def _reference_of(
  images: image_sets.ImageSet,
  rows: Int[np.ndarray, '_'],
  batch_size: int,
  size: sizes.Size,
  wanted: Any,
) -> references.Reference:
  """Centre crops of some images as a reference."""
  if not isinstance(images.source, data.PictureSource):
    return references.of_npz(
      images.path, wanted, image_size=size, batch_size=batch_size
    )
  batches = data.make_row_dataset(
    images.source,
    rows,
    batch_size=batch_size,
    image_size=size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  return references.of_batches(batches, wanted, image_size=size)


def _zipped(
  made: Iterator[image_sets.Batch], originals: Iterator[image_sets.Batch] | None
) -> Iterator[image_sets.Batch]:
  """Batches of images, with their originals beside them if there are any."""
  if originals is None:
    yield from made
    return
  for batch, other in zip(made, originals, strict=True):
    yield {
      'image': batch['image'],
      'mask': batch['mask'],
      'original': other['image'],
    }


def _as_scores(
  name: str, found: Sequence[paired.Measured], common: Mapping[str, Any]
) -> list[scores.Score]:
  """Scores with all of their protocol: their own part counts before others."""
  here = evaluate.here()
  return [
    scores.Score(name, metric, value, {**own, **_without(common, own), **here})
    for metric, value, own in found
  ]


def _without(
  common: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
  """The common part of a protocol beside a score's own part."""
  # Another reference is another crop and another fingerprint.
  skips = 'reference' in own
  return {
    key: value
    for key, value in common.items()
    if key not in own
    and not (skips and (key.startswith('reference') or key == 'crop'))
  }


def _described(source: data.Source, count: int) -> dict[str, Any]:
  """The part of a protocol that tells the images."""
  return {
    'reference': repr(source),
    'reference_fingerprint': source.fingerprint[:12],
    'count': count,
  }


def _names(batches: data.EvalBatches) -> list[str]:
  """Names of the pictures in the order of the batches of all processes."""
  order = batches.order[batches.order >= 0].tolist()
  names = getattr(batches.source, 'names', None)
  return [names[i] if names is not None else f'{i:06d}' for i in order]


def _check_scales(config: Config) -> tuple[float, ...]:
  """The scales of guidance of the configuration, which are finite numbers."""
  scales = tuple(config.guidance_scales)
  for scale in scales:
    if not isinstance(scale, int | float) or not math.isfinite(scale):
      raise errors.ConfigError(
        f'guidance_scales={scales}; wanted numbers, as '
        '--config.guidance_scales="(1.0, 1.5)"'
      )
  return scales


def _open_trained(
  config: Config, trained: Mapping[str, Any], mesh: Mesh
) -> data.EvalBatches:
  """Opens the images of the configuration, else those of the training.

  They come in the order of their names, as in `score_samples`.

  Args:
    config: empty values in it are those of the training.
    trained: the section `data` of the run's configuration.
    mesh: the devices that share a batch.
  """
  # The kind of a path of one's own is detected, unless a source is named.
  own = 'auto' if config.data.path else trained['source']
  image_size = sizes.canonical(trained['image_size'])
  source = data.open_source(
    config.data.source or own,
    config.data.path or trained['path'],
    config.data.split,
    image_size,
    # As the training read them: earlier versions ignored the orientation.
    options=data.Options(
      trained.get('exif', False),
      trained.get('max_pixels', data.Options().max_pixels),
    ),
    bad=trained.get('bad', 'stop'),
  )
  wanted = config.data.num_images
  if wanted < 0:
    raise errors.ConfigError(
      f'data.num_images={wanted}; wanted 0 (all) or more'
    )
  sharding.check_batch_size(config.data.batch_size, mesh, 'data.batch_size')
  count = min(wanted or len(source), len(source))
  rows = np.arange(count) * len(source) // max(count, 1)
  names = getattr(source, 'names', None)
  if names is not None:
    rows = np.array(sorted(rows.tolist(), key=lambda row: names[row]))
  return data.make_row_dataset(
    source,
    rows,
    batch_size=config.data.batch_size,
    image_size=image_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    num_threads=config.data.num_threads,
  )
