"""Commands are thin, and any number of them can be imported together."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MAINS = sorted(
  path.stem
  for path in (ROOT / 'launch').glob('*.py')
  if path.stem not in ('__init__', 'cli')
)
# The parts of the library that commands call. They know no network, loss or
# equation of their own.
MAY_IMPORT = (
  *('errors', 'files', 'pixels', 'trees', 'data', 'pretrained', 'inference'),
  *('evaluation', 'stages', 'presets', 'training'),
)


def _tree(main: str) -> ast.Module:
  return ast.parse((ROOT / 'launch' / f'{main}.py').read_text())


def _public_names(tree: ast.Module) -> set[str]:
  return {
    node.name
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != '_'
  }


def _imported_parts(tree: ast.Module) -> set[str]:
  """Parts of the package, and modules of launch, that a main imports."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  ours = [name.split('.') for name in names]
  return {
    part[1] if part[0] == 'selfboottok_jax' else '.'.join(part)
    for part in ours
    if part[0] in ('selfboottok_jax', 'launch', 'configs', 'tests')
  }


@pytest.mark.parametrize('main', MAINS)
def test_a_main_has_no_function_that_a_library_user_would_want(main):
  names = _public_names(_tree(main))
  assert names == {'main'}


@pytest.mark.parametrize('main', MAINS)
def test_a_main_imports_the_library_and_no_other_main(main):
  assert _imported_parts(_tree(main)) <= {'launch.cli', *MAY_IMPORT}


def test_a_wrong_main_would_be_seen():
  wrong = ast.parse(
    'from launch import train\n'
    'from selfboottok_jax.models import sit\n'
    'def main(): pass\n'
    'def useful(): pass\n'
  )
  assert _public_names(wrong) == {'main', 'useful'}
  assert _imported_parts(wrong) == {'launch.train', 'models'}


def _python(code: str) -> None:
  result = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr


def test_all_mains_can_be_imported_by_one_process():
  """In any order, repeatedly, and without touching absl's flags."""
  _python(
    'import importlib, itertools, sys\n'
    'from absl import flags\n'
    'from launch import cli\n'
    'before = set(flags.FLAGS)\n'
    f'mains = {MAINS}\n'
    'for order in (mains, mains[::-1], mains[3:] + mains[:3]):\n'
    '  for main in order:\n'
    '    sys.modules.pop(f"launch.{main}", None)\n'
    '    module = importlib.import_module(f"launch.{main}")\n'
    '    assert isinstance(module.FLAGS, cli.Flags), main\n'
    'ours = {"config", "workdir", "out", "tokenizer", "network", "runs"}\n'
    'assert not ours & (set(flags.FLAGS) - before)\n'
  )


def test_what_draws_is_imported_only_where_it_is_used():
  _python(
    'import sys\n'
    # As if they were not installed: ott takes matplotlib if it is there.
    'for name in ("matplotlib", "jinja2", "skimage"):\n'
    '  sys.modules[name] = None\n'
    'import launch.train, launch.report\n'
    'import selfboottok_jax.evaluation.evaluate\n'
  )


def test_a_config_file_runs_once(tmp_path):
  """And only when a command is started, not when it is imported."""
  config = tmp_path / 'counted.py'
  config.write_text(
    'import pathlib\n'
    'from ml_collections import ConfigDict\n'
    'def get_config():\n'
    f'  path = pathlib.Path({str(tmp_path / "count")!r})\n'
    '  path.write_text((path.read_text() if path.exists() else "") + "x")\n'
    '  return ConfigDict({"size": 1})\n'
  )
  _python(
    'import sys\n'
    f'sys.argv = ["command", "--config={config}", "--config.size=2"]\n'
    'from launch import cli, train\n'
    'def main():\n'
    '  assert train._CONFIG.value.size == 2\n'
    f'  assert train._CONFIG.name == "{config} config.size=2"\n'
    'cli.run(main, train.FLAGS)\n'
  )
  assert (tmp_path / 'count').read_text() == 'x'
