"""The ablations: rows of the paper's tables, and the controls that it lacks.

A row says what it changes in each training, as keys of the configurations in
this folder, and which trainings it needs. Nothing here depends on the size of
the model: rows are trained at any of BASES. `stages.ablation` turns the two
into trainings; rows that need an equal training share its run.

Use as configs/ablations.py; launch.ablate trains and scores them.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from selfboottok_jax import errors, presets
from selfboottok_jax.presets import scaling, tokenizer

Changes = Mapping[str, Any]
_NONE: Changes = {}

TABLES = {
  'table3': 'Parts of the method (Table 3)',
  'table2': 'Teachers of the local 1D tokens (Table 2)',
  'figure5': 'Local groups, in stage 1 alone (Fig. 5)',
  'figure6': 'Size of the local 2D aligner, generator trained once (Fig. 6)',
  'fusion': 'Fusion of the groups (Eq. 11)',
  'bootstrap_from': 'What the code is, and the local groups read',
  'cross_attend': 'What the decoder reads by cross-attention',
  'assignment': 'How tokens are assigned to codes (Eq. 2)',
  'data': 'Local learning on more unlabelled images',
  'controls': 'Controls that the paper lacks',
}


@dataclasses.dataclass(frozen=True)
class Row:
  """A variant of the method.

  Attributes:
    table: a key of TABLES.
    name: unique within the table.
    title: the row's name for people.
    tokenizer: what stage 1 changes, by key of its configuration.
    aligner: the size of stage 2's aligner, a key of `Base.aligners`; '' trains
      no stage 2.
    scaling: what stage 2 changes.
    generator: what the generator changes; None trains none.
    decoder_like: another row, as 'TABLE/NAME', with as many parameters: the
      decoder is widened or deepened until this one has them too.
    long_like: another row; stage 1 takes as many steps as its stages 1 and 2.
    more_data: stage 2 sees other images than stage 1, see --more_data.
  """

  table: str
  name: str
  title: str
  tokenizer: Changes = dataclasses.field(default_factory=dict)
  aligner: str = ''
  scaling: Changes = dataclasses.field(default_factory=dict)
  generator: Changes | None = None
  decoder_like: str = ''
  long_like: str = ''
  more_data: bool = False

  @property
  def path(self) -> str:
    """The name that --rows takes, as table3/full."""
    return f'{self.table}/{self.name}'

  @property
  def stages(self) -> tuple[str, ...]:
    """The trainings that the row needs, in their order."""
    needed = {
      'tokenizer': True,
      'scaling': bool(self.aligner),
      'generator': self.generator is not None,
    }
    return tuple(stage for stage, is_needed in needed.items() if is_needed)


_ROWS, SOFTVQ = tokenizer.VARIANTS, tokenizer.VARIANTS['softvq']
# SiT without REG, as SoftVQ's authors train it; sampled as all rows are.
PLAIN_SIT = {'networks.teacher': '', 'loss.cls': 0.0, 'loss.align_mode': 'off'}
ROWS = (
  Row(
    'table3', 'softvq', 'SoftVQ, plain SiT', _ROWS['softvq'],
    generator=PLAIN_SIT,
  ),
  Row('table3', 'g_l1', 'G + L1', _ROWS['g_l1'], generator=_NONE),
  Row(
    'table3', 'c_off', 'G + L1 + L2, C off', _ROWS['c_off'],
    aligner='600m', generator=_NONE,
  ),
  Row(
    'table3', 'cb_off', 'G + L1 + L2, CB off', _ROWS['cb_off'],
    # Local tokens have no codebook of their own to train.
    aligner='600m', scaling={'trainable': ('local2d',)}, generator=_NONE,
  ),
  Row('table3', 'full', 'G + L1 + L2', aligner='600m', generator=_NONE),
  Row(
    'table2', 'ijepa', 'I-JEPA', {'networks.repa_local': 'ijepa_h'},
    aligner='400m',
  ),
  Row('table2', 'dinov2', 'DINOv2', _ROWS['dinov2'], aligner='400m'),
  Row('table2', 'siglip2', 'SigLIP 2', _ROWS['siglip2'], aligner='400m'),
  Row('figure5', 'g', 'G', {'model.local1d_width': 0, **_ROWS['g_l1']}),
  Row('figure5', 'g_l1', 'G + L1', _ROWS['g_l1']),
  Row('figure5', 'g_l2', 'G + L2', {'model.local1d_width': 0}),
  Row('figure5', 'g_l1_l2', 'G + L1 + L2'),
  *(
    Row('figure6', size, f'L2 of {size.upper()}', aligner=size, generator=_NONE)
    for size in scaling.SIZES
  ),
  Row('fusion', 'residual', 'soft residual', generator=_NONE),
  Row(
    'fusion', 'concat', 'concatenation', {'model.fusion': 'concat'},
    generator=_NONE,
  ),
  Row('bootstrap_from', 'continuous', 'z_G', generator=_NONE),
  Row(
    'bootstrap_from', 'quantized', 'q_G',
    {'model.bootstrap_from': 'quantized', 'loss.repa_input': 'quantized'},
    generator=_NONE,
  ),
  Row('cross_attend', 'locals', 'local tokens'),
  Row(
    'cross_attend', 'all', 'local and fused tokens',
    {'model.cross_attend': 'all'},
  ),
  Row('assignment', 'cosine', 'cosine'),
  Row(
    'assignment', 'l2', 'distance, tokens of any length',
    {'model.assignment': 'l2', 'model.unit_rms': False},
  ),
  Row('data', 'same', 'the images of stage 1', aligner='600m'),
  Row('data', 'more', 'more images', aligner='600m', more_data=True),
  Row('controls', 'softvq_reg', 'SoftVQ with REG', SOFTVQ, generator=_NONE),
  Row(
    'controls', 'softvq_large', 'SoftVQ with REG, as large as stage 1', SOFTVQ,
    decoder_like='figure5/g_l1_l2', generator=_NONE,
  ),
  Row(
    'controls', 'softvq_largest', 'SoftVQ with REG, as large as G + L1 + L2',
    SOFTVQ, decoder_like='table3/full', generator=_NONE,
  ),
  Row(
    'controls', 'long', 'stage 1 alone, as long as stages 1 and 2',
    long_like='table3/full', generator=_NONE,
  ),
  Row(
    'controls', 'local_input', 'local groups read q_G, the code is z_G',
    {'model.local_input': 'quantized'}, aligner='600m', generator=_NONE,
  ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Base:
  """The presets that rows are changes of.

  Attributes:
    tokenizer: preset of stage 1.
    generator: preset of the generator.
    aligners: preset of stage 2 and its changes, by size. The names of sizes
      are the paper's, and true at imagenet256 alone; elsewhere they are steps
      of a ladder, of which the first is stage 1's own aligner.
  """

  tokenizer: str
  generator: str
  aligners: Mapping[str, tuple[str, Changes]]


def _ladder(preset: str) -> dict[str, tuple[str, Changes]]:
  """Stage 1's width with more and more blocks, by the paper's sizes."""
  depths = dict(zip(scaling.SIZES, (2, 4, 8, 12, 16), strict=True))
  return {
    size: (preset, {'model.local2d_depth': depth})
    for size, depth in depths.items()
  }


BASES = {
  'quickstart': Base('quickstart', 'quickstart', _ladder('quickstart')),
  'photos64': Base('photos64', 'photos64', _ladder('photos64')),
  'photos64_mobilenet': Base(
    'photos64_mobilenet', 'photos64', _ladder('photos64_mobilenet')
  ),
  'imagenet256': Base(
    'imagenet256',
    'imagenet256_xl',
    {size: (f'imagenet256_{size}', {}) for size in scaling.SIZES},
  ),
}


def find(path: str) -> Row:
  """The row of a path, as 'table3/full'."""
  return next(row for row in ROWS if row.path == path)


def choose(names: Iterable[str]) -> list[Row]:
  """The rows of tables and paths of rows, in their order, each once.

  Raises:
    ConfigError: a name of neither kind; lists those that exist.
  """
  names = list(names)
  known = {*TABLES, *(row.path for row in ROWS)}
  for name in names:
    if name not in known:
      raise errors.ConfigError(
        f'--rows={",".join(names)}: there is no table and no row {name!r}; '
        f'wanted some of {", ".join(TABLES)}, or one row as table3/full '
        '(--list has all)'
      )
  return [row for row in ROWS if row.table in names or row.path in names]


def get_config() -> ml_collections.ConfigDict:
  """The keys that may be changed for all rows at once.

  Those of the trainings stand at the top, for each training that has such a
  key, and again in a section of each stage, for it alone. `evaluate` has those
  of launch.evaluate.
  """
  config = presets.get_config('tokenizer:quickstart').unlock()
  stages = {
    stage: presets.get_config(f'{stage}:quickstart') for stage in presets.STAGES
  }
  # The runs that rows need are theirs to name.
  for stage in stages.values():
    stage.unlock()
    del stage.task, stage.tokenizer
  del config.task, config.tokenizer
  for stage in stages.values():
    _add_missing(config, stage)
  for name, stage in stages.items():
    config[name] = stage
  config.evaluate = presets.get_config('evaluate')
  return config


def _add_missing(
  config: ml_collections.ConfigDict, other: ml_collections.ConfigDict
) -> None:
  """Adds the keys of another configuration that one lacks."""
  for key in other:
    if key not in config:
      config[key] = other[key]
    elif isinstance(config[key], ml_collections.ConfigDict):
      _add_missing(config[key], other[key])
