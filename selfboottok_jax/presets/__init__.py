"""Presets by name: plain ml_collections, importable without jax.

A configuration has a section for each thing that is built from it, and the
section has that thing's fields: `model` those of `models.tokenizer.Tokenizer`
or `models.sit.SiT`, `loss` those of a stage's `Objective`, and so on. Their
defaults stand once, in the class; `fields_of` reads them there.
"""

import ast
import importlib
import importlib.resources
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from selfboottok_jax import errors, sizes

Preset = Callable[[ml_collections.ConfigDict], None]

STAGES = ('tokenizer', 'scaling', 'generator')


class _SizeParser(flags.ArgumentParser):
  """Reads an image's size from a command line, as 64 or "(96, 64)"."""

  def parse(self, argument: Any) -> Any:
    """Reads a text; a field's own value comes through here as well."""
    if not isinstance(argument, str):
      return argument
    size = sizes.parse(argument)
    if not isinstance(size, sizes.AnySize):
      raise ValueError('wanted a whole number, or (height, width)')
    return size

  def flag_type(self) -> str:
    """Names the kind of value in --help."""
    return 'size'


# Whoever reads a preset may let flags change it.
config_flags.register_flag_parser_for_type(sizes.AnySize, _SizeParser())


def get_config(name: str) -> ml_collections.ConfigDict:
  """The configuration of a preset, locked: values may change, keys may not.

  Args:
    name: 'STAGE:PRESET', as 'tokenizer:photos64', or 'evaluate', the settings
      of a scoring.

  Raises:
    ConfigError: no such stage or preset; lists those that exist.
  """
  stage, _, preset = name.partition(':')
  if stage not in STAGES and name != 'evaluate':
    raise errors.ConfigError(
      f'no stage {stage!r} in {name!r}; wanted STAGE:PRESET with one of '
      f'{", ".join(STAGES)}, as tokenizer:photos64, or evaluate'
    )
  module = importlib.import_module(f'{__name__}.{stage}')
  try:
    # A scoring has no presets.
    arguments = () if name == 'evaluate' else (preset,)
    return module.get_config(*arguments).lock()
  except ValueError as error:
    raise errors.ConfigError(str(error)) from error


def choose(presets: Mapping[str, Preset], preset: str, file: str) -> Preset:
  """The function of a preset; ValueError with the names that exist."""
  if preset not in presets:
    raise ValueError(
      f'{file} has no preset {preset!r}; choose one of {", ".join(presets)}'
    )
  return presets[preset]


def fields_of(
  module: str, name: str, *, without: Collection[str] = ()
) -> ml_collections.ConfigDict:
  """The fields of a class, or parameters of a function, that have defaults.

  They are read from the source, not from the imported object: importing a
  model would import jax, which takes seconds and may claim an accelerator on a
  machine that only launches trainings. So a default must be a literal.

  Args:
    module: path below the package, as 'models/sit.py'.
    name: of the class or function.
    without: fields that a configuration does not choose.
  """
  source = importlib.resources.files('selfboottok_jax').joinpath(module)
  tree = ast.parse(source.read_text('utf-8'))
  node = next(n for n in tree.body if getattr(n, 'name', None) == name)
  defaults: dict[str, ast.expr | None]
  if isinstance(node, ast.FunctionDef):
    names, count = node.args.args, len(node.args.defaults)
    pairs = zip(names[len(names) - count :], node.args.defaults, strict=True)
    keyword_only = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    defaults = {a.arg: value for a, value in (*pairs, *keyword_only)}
  else:
    assert isinstance(node, ast.ClassDef)
    defaults = {
      statement.target.id: statement.value
      for statement in node.body
      if isinstance(statement, ast.AnnAssign)
      and isinstance(statement.target, ast.Name)
    }
  return ml_collections.ConfigDict(
    {
      field: ast.literal_eval(value)
      for field, value in defaults.items()
      if value is not None and field not in without
    }
  )


def get_base(task: str) -> ml_collections.ConfigDict:
  """The keys that all stages read, with the values that most share."""
  config = ml_collections.ConfigDict()
  config.task = task
  # Workdir of a tokenizer run; stage 1 has none.
  config.tokenizer = ''
  # Workdir of a run of the same task to fine-tune from; '' starts fresh.
  config.init_from = ''

  config.data = fields_of('data/pictures.py', 'Options')
  # procedural, or the form of the path, which auto sees by itself.
  config.data.source = 'auto'
  config.data.path = ''
  config.data.batch_size = 256  # global, over all processes and devices
  # Pixels a side, or (height, width); each a multiple of the patch size.
  config.data.image_size = config_dict.FieldReference(
    256, field_type=sizes.AnySize
  )
  config.data.random_crop = True  # of a random scale; else the centre
  config.data.flip = True  # mirror every other picture
  config.data.bad = 'stop'  # at pictures that cannot be read; or skip them
  # Decoding threads of each process, and processes beside it; -1 is by cores.
  config.data.num_threads = -1
  config.data.num_workers = -1

  config.train = ml_collections.ConfigDict()
  config.train.steps = 250_000
  config.train.seed = 0
  config.train.ema = 0.9999
  config.train.log_every = 100
  # Parts of a batch that are computed one after the other, to save memory.
  config.train.accumulate = 1

  config.optimizer = fields_of('training/optim.py', 'build_optimizer')
  config.optimizer.learning_rate = 1e-4

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.every = 5_000
  config.evaluation.num_images = 5_000  # 0 is all
  config.evaluation.batch_size = 64

  config.log = ml_collections.ConfigDict()
  # Pictures of reconstructions that stay in the workdir, the newest; 0 is none.
  config.log.grids_kept = 5
  # Project at Weights & Biases, as 'PROJECT' or 'ENTITY/PROJECT'; '' is none.
  config.log.wandb = ''

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 5_000
  config.checkpoint.max_to_keep = 2

  # What a dry run or a benchmark supposes where nothing is given.
  config.assumed = ml_collections.ConfigDict()
  config.assumed.num_classes = 1_000
  config.assumed.tokenizer = ''  # a preset of stage 1

  # data: -1 takes all devices that fsdp leaves.
  config.mesh = fields_of(
    'training/sharding.py', 'make_mesh', without=('devices',)
  )
  return config
