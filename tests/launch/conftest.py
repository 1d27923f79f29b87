"""Commands to run, and four tiny runs that the tests of this folder share."""

import pathlib

import pytest

from tests.launch import commands, pictures


@pytest.fixture(scope='session')
def server(tmp_path_factory) -> commands.Server:
  return commands.Server(tmp_path_factory.mktemp('outputs'))


@pytest.fixture(scope='session')
def quickstart(
  server, tmp_path_factory
) -> tuple[pathlib.Path, commands.Result]:
  """A whole quickstart of tiny presets: its workdir, and how it ended."""
  workdir = tmp_path_factory.mktemp('quickstart') / 'runs'
  return workdir, server.run('quickstart', f'--workdir={workdir}')


@pytest.fixture(scope='session')
def runs(quickstart) -> pathlib.Path:
  """The folder of its runs: softvq, tokenizer, scaled and generator."""
  workdir, result = quickstart
  assert result.code == 0, result.err
  return workdir


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> pathlib.Path:
  """A folder of photographs in two classes, with train/ and val/."""
  folder = tmp_path_factory.mktemp('photos')
  for split in ('train', 'val'):
    for name in ('cat', 'dog'):
      pictures.write(folder / split / name, 4)
  return folder
