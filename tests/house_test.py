"""Rules of the house that a reader relies on and no linter knows."""

import ast
import functools
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

from configs import evaluate as evaluate_config
from selfboottok_jax import inference, trees
from selfboottok_jax.models import discriminators, sit
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.presets import generator, scaling, tokenizer
from selfboottok_jax.stages import generator as generator_task
from selfboottok_jax.stages import objective
from selfboottok_jax.training import optim, sharding

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = 'selfboottok_jax'

# The ground floor, which every room may import.
GROUND = ('errors', 'files', 'pixels', 'placement', 'sizes', 'trees')
# What a part may import of ours, besides itself and the ground floor. The first
# prefix that fits a module decides.
MAY_IMPORT = {
  'errors': (),
  'trees': (),
  'files': (),
  'pixels': (),
  'placement': (),
  'sizes': (),
  # Configurations are read without jax.
  'presets': (),
  'models.layers': (),
  'models': ('models',),
  'objectives': (),
  'flow': (),
  'data': (),
  'pretrained': ('models',),
  'training': (),
  'inference': ('models', 'pretrained', 'flow', 'training'),
  'evaluation': (
    *('models', 'pretrained', 'objectives', 'flow', 'data'),
    *('training', 'inference'),
  ),
  'stages': (
    *('presets', 'models', 'pretrained', 'objectives', 'flow', 'data'),
    *('training', 'inference', 'evaluation'),
  ),
  # The public surface.
  '': ('inference', 'presets', 'stages'),
}


def _modules():
  return sorted((ROOT / PACKAGE).rglob('*.py'))


def _name(path: pathlib.Path) -> str:
  """The dotted name below the package, '' for the package itself."""
  relative = path.relative_to(ROOT / PACKAGE).with_suffix('')
  return '.'.join(p for p in relative.parts if p != '__init__')


def _inside(name: str, part: str) -> bool:
  return name == part or name.startswith(f'{part}.')


def _imports(source: str) -> set[str]:
  """Dotted names of our modules that a source imports, package left out."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, 'relative import'
      found |= {f'{node.module}.{alias.name}' for alias in node.names}
  ours = (PACKAGE, 'launch', 'configs', 'tests')
  found = {name for name in found if name.split('.')[0] in ours}
  found.discard(f'{PACKAGE}.__version__')  # A constant is of no room.
  return {name.removeprefix(f'{PACKAGE}.') for name in found}


def _upward(name: str, source: str) -> set[str]:
  """Imports of module `name` that the table does not allow."""
  part = next(p for p in MAY_IMPORT if not p or _inside(name, p))
  own = part.split('.')[0]
  # `models` may read all of itself, `models.layers` nothing.
  ground = ('errors', 'sizes') if part == 'presets' else GROUND
  allowed = (*MAY_IMPORT[part], *ground, *([own] if own == part else []))
  return {
    imported
    for imported in _imports(source)
    if not any(_inside(imported, a) for a in allowed if a)
  }


@pytest.mark.parametrize('path', _modules(), ids=_name)
def test_imports_run_one_way(path):
  assert not _upward(_name(path), path.read_text())


@pytest.mark.parametrize(
  ('name', 'statement'),
  [
    ('models.layers', 'from selfboottok_jax.models import sit'),
    ('models.sit', 'from selfboottok_jax.flow import path'),
    ('training.loop', 'import selfboottok_jax.models.sit'),
    ('training.loop', 'from selfboottok_jax import stages'),
    ('evaluation.cost', 'from selfboottok_jax.stages import task'),
    ('presets.base', 'from selfboottok_jax import trees'),
    ('pretrained.vit', 'from selfboottok_jax.inference import tokenizer'),
    ('inference', 'from selfboottok_jax.evaluation import scores'),
    ('evaluation.scores', 'from launch import cli'),
  ],
)
def test_an_upward_import_would_be_seen(name, statement):
  assert _upward(name, statement)


def test_only_the_machinery_takes_gradients_and_applies_updates():
  steps = re.compile(r'\b(value_and_grad|apply_updates)\b')
  machinery = (ROOT / PACKAGE / 'training').glob('*.py')
  assert any(steps.search(path.read_text()) for path in machinery)
  for folder in (ROOT / PACKAGE / 'stages', ROOT / 'launch'):
    for path in folder.rglob('*.py'):
      assert not steps.search(path.read_text()), path


PRESETS = [
  (module, preset)
  for module in (tokenizer, scaling, generator)
  for preset in module.PRESETS
]


@functools.cache
def _sources(pattern: str) -> str:
  return '\n'.join(path.read_text() for path in sorted(ROOT.glob(pattern)))


def _read_fields(cls: type) -> set[str]:
  """Fields of a module that its own code reads, as self.FIELD."""
  source = inspect.getsource(sys.modules[cls.__module__])
  return {
    name
    for name in cls.__dataclass_fields__
    # `getattr(self, ...)` over names spelt out is reading too.
    if re.search(rf"self\.{name}\b|'(model|data)\.{name}'", source)
  }


def _read_parameters(function) -> set[str]:
  """Parameters of a function that its body reads."""
  tree = ast.parse(inspect.getsource(function)).body[0]
  read = {
    node.id
    for statement in tree.body
    for node in ast.walk(statement)
    if isinstance(node, ast.Name)
  }
  return read & inspect.signature(function).parameters.keys()


def _read_weights(cls: type) -> set[str]:
  """Fields of an objective that a task or the building of one reads."""
  source = _sources(f'{PACKAGE}/stages/*.py')
  return {
    name
    for name in cls.__dataclass_fields__
    if re.search(rf'\b(o|objective|goal)\.{name}\b', source)
  }


def _read_of_discriminators() -> set[str]:
  """Their kind, and the fields of each, after the kind's name."""
  kinds = {
    'dino': discriminators.DinoDiscriminator,
    'stylegan': discriminators.StyleGanDiscriminator,
  }
  fields = {f'{k}.{f}' for k, cls in kinds.items() for f in _read_fields(cls)}
  return {'kind', *fields}


def _unread(config) -> list[str]:
  """Keys of a configuration that no code reads."""
  is_generator = config.task == 'generator'
  model = sit.SiT if is_generator else tokenizer_lib.Tokenizer
  goal = generator_task.Objective if is_generator else objective.Objective
  read = {
    'optimizer': _read_parameters(optim.build_optimizer),
    'mesh': _read_parameters(sharding.make_mesh),
    'discriminator': _read_of_discriminators(),
    'model': _read_fields(model),
    'loss': _read_weights(goal),
  }
  if not is_generator:
    read['networks'] = {
      'discriminator',
      *objective.active_terms(
        tokenizer_lib.Tokenizer(image_size=256), objective.Objective()
      ),
    }
  if 'sampling' in config:
    read['sampling'] = _read_fields(inference.Sampling)
  launch = _sources(f'{PACKAGE}/stages/*.py')
  unread = []
  for key in trees.flatten(config.to_dict()):
    section, _, name = key.partition('.')
    if section in read:
      known = name in read[section]
    else:
      known = re.search(rf'\bconfig\.{re.escape(key)}\b', launch) is not None
    if not known:
      unread.append(key)
  return unread


@pytest.mark.parametrize(
  ('module', 'preset'), PRESETS, ids=lambda v: getattr(v, '__name__', v)
)
def test_every_key_of_every_preset_is_read(module, preset):
  assert not _unread(module.get_config(preset))


def test_every_key_of_evaluation_is_read():
  keys = trees.flatten(evaluate_config.get_config().to_dict())
  source = _sources(f'{PACKAGE}/stages/score.py')
  assert keys
  for key in keys:
    assert re.search(rf'\bconfig\.{re.escape(key)}\b', source), key


def test_a_key_that_nobody_reads_would_be_seen():
  config = tokenizer.get_config()
  sections = ('train', 'model', 'loss', 'optimizer', 'networks', 'mesh')
  for section in sections:
    config[section].nobody = 1
  config.nobody = 1
  assert set(_unread(config)) == {
    'nobody',
    *(f'{section}.nobody' for section in sections),
  }


WITHOUT_JAX = """
import sys
for name in ('jax', 'jaxlib', 'flax'):
  sys.modules[name] = None
from configs import evaluate, generator, scaling, tokenizer
from selfboottok_jax import presets
presets.get_config('tokenizer:photos64')
evaluate.get_config()
for module in (generator, scaling, tokenizer):
  for preset in module.PRESETS:
    module.get_config(preset)
"""


def test_configs_need_no_jax():
  subprocess.run([sys.executable, '-c', WITHOUT_JAX], cwd=ROOT, check=True)


@pytest.mark.parametrize('module', [tokenizer, scaling, generator])
def test_an_unknown_preset_lists_the_others(module):
  with pytest.raises(ValueError, match='quickstart, photos64'):
    module.get_config('nothing')


# Modules without a test file of their own, and why.
UNTESTED = {
  'errors': 'exceptions and two one-line checks that every room uses',
  'presets.evaluate': 'a list of values, which stages/score_test reads',
  'presets.generator': 'presets_test builds every preset',
  'presets.scaling': 'presets_test builds every preset',
  'presets.tokenizer': 'presets_test builds every preset',
  'stages.import_run': 'tests/launch/import_*_test import every family',
}


def test_every_module_has_its_test_file():
  missing = {
    _name(path)
    for path in _modules()
    if path.name != '__init__.py'
    and not (ROOT / 'tests' / path.relative_to(ROOT / PACKAGE))
    .with_name(f'{path.stem}_test.py')
    .is_file()
  }
  assert missing == set(UNTESTED)
