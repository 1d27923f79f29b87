"""Contents of wheel and sdist, and an installed package at work."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import parser

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[1]
PACKED = ('.ci', 'configs', 'docs', 'launch', 'selfboottok_jax', 'tests')


@pytest.fixture(scope='module')
def packages(tmp_path_factory):
  """An sdist of this checkout, and the wheel that is built from the sdist."""
  source = tmp_path_factory.mktemp('source')
  for path in ROOT.iterdir():
    if path.is_file():
      shutil.copy(path, source)
  for name in PACKED:
    shutil.copytree(
      ROOT / name,
      source / name,
      ignore=shutil.ignore_patterns('__pycache__', '*.pyc'),
    )
  out = tmp_path_factory.mktemp('packages')
  subprocess.run(
    [
      sys.executable,
      '-m',
      'build',
      '--no-isolation',
      f'--outdir={out}',
      source,
    ],
    check=True,
    capture_output=True,
  )
  (sdist,), (wheel,) = out.glob('*.tar.gz'), out.glob('*.whl')
  return sdist, wheel


def _tracked(*folders: str) -> set[str]:
  return {
    str(path.relative_to(ROOT))
    for folder in folders
    for path in (ROOT / folder).rglob('*')
    if path.is_file() and path.suffix != '.pyc'
  }


def test_the_wheel_is_the_package(packages):
  _, wheel = packages
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  info = {name for name in names if '.dist-info/' in name}
  assert names - info == _tracked('selfboottok_jax')
  assert {
    'selfboottok_jax/py.typed',
    'selfboottok_jax/presets/tokenizer.py',
    'selfboottok_jax/data/imagenet_classes.tsv',
    'selfboottok_jax/evaluation/templates/report.html',
    'selfboottok_jax/evaluation/paper_tables/table1.toml',
  } <= names
  assert any(name.endswith('/licenses/LICENSE') for name in info)


def test_the_wheel_says_what_it_is(packages):
  _, wheel = packages
  with zipfile.ZipFile(wheel) as archive:
    (name,) = (n for n in archive.namelist() if n.endswith('/METADATA'))
    metadata = parser.Parser().parsestr(archive.read(name).decode())
  assert metadata['Author']
  assert metadata['License-Expression'] == 'Apache-2.0'
  assert 'arxiv.org/abs/2606.05552' in metadata['Project-URL']
  classifiers = set(metadata.get_all('Classifier'))
  for version in ('3.11', '3.12', '3.13'):
    assert f'Programming Language :: Python :: {version}' in classifiers
  assert 'Typing :: Typed' in classifiers
  extras = {'cuda', 'cuda12', 'cuda13', 'tpu', 'gcs', 'report', 'tensorboard'}
  assert extras <= set(metadata.get_all('Provides-Extra'))
  required = {
    re.match(r'[\w.-]+', line)[0].lower()
    for line in metadata.get_all('Requires-Dist')
    if 'extra ==' not in line
  }
  assert {'jax', 'flax', 'orbax-checkpoint'} <= required
  assert not required & {
    *('scikit-image', 'matplotlib', 'jinja2', 'tensorboardx', 'torch'),
    *('gcsfs', 'google-cloud-storage'),
  }


def test_the_sdist_is_the_checkout(packages):
  sdist, _ = packages
  with tarfile.open(sdist) as archive:
    names = {
      member.name.partition('/')[2]
      for member in archive.getmembers()
      if member.isfile()
    }
  assert names >= _tracked(*PACKED) | {
    *('CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE', 'Makefile', 'README.md'),
    *('requirements.txt', 'requirements-test.txt', 'requirements-parity.txt'),
  }


TEN_LINES = """
import jax
import numpy as np
import selfboottok_jax as sbt

config = sbt.get_config('tokenizer:quickstart')
config.train.steps = 20
sbt.train(config, 'run')
tokenizer = sbt.load_tokenizer('run')
size = config.data.image_size
images = np.random.default_rng(0).uniform(-1, 1, (2, size, size, 3))
images = images.astype(np.float32)
codes = jax.jit(tokenizer.encode)(images)
scoring = sbt.get_config('evaluate')
scoring.data.num_images = 64
assert {score.metric for score in sbt.score_run(scoring, 'run')} >= {'psnr'}
print(sbt.__file__, codes.shape, tokenizer.decode(codes).shape)
"""


def test_an_installed_package_trains_and_reconstructs(packages, tmp_path):
  """Installed beside this environment's packages, run outside the checkout."""
  _, wheel = packages
  site = tmp_path / 'site'
  pip = [sys.executable, '-m', 'pip', 'install', '--quiet', '--no-deps']
  subprocess.run([*pip, f'--target={site}', wheel], check=True)
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  ended = subprocess.run(
    [sys.executable, '-c', TEN_LINES],
    cwd=elsewhere,
    env=os.environ | {'PYTHONPATH': str(site)},
    check=False,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, ended.stderr
  place, *shapes = ended.stdout.splitlines()[-1].split(' ', 1)
  assert pathlib.Path(place).is_relative_to(site)
  assert shapes == ['(2, 16, 16) (2, 32, 32, 3)']
