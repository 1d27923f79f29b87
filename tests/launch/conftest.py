"""Commands to run, and four tiny runs that the tests of this folder share."""

import dataclasses
import fcntl
import json
import os
import pathlib
import shutil

import pytest

from tests.launch import commands, pictures


@pytest.fixture(scope='session')
def server(tmp_path_factory) -> commands.Server:
  return commands.Server(tmp_path_factory.mktemp('outputs'))


@pytest.fixture(scope='session')
def quickstart(
  server, tmp_path_factory
) -> tuple[pathlib.Path, commands.Result]:
  """A whole quickstart of tiny presets: its workdir, and how it ended.

  Under xdist the first worker that asks makes it, and the others wait for it.
  """
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  workdir, ended = folder / 'quickstart', folder / 'quickstart.json'
  with (folder / 'quickstart.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not ended.exists():
      result = server.run('quickstart', f'--workdir={workdir}')
      ended.write_text(json.dumps(dataclasses.asdict(result)))
  return workdir, commands.Result(**json.loads(ended.read_text()))


@pytest.fixture(scope='session')
def runs(quickstart, tmp_path_factory) -> pathlib.Path:
  """A copy, of this worker's own: softvq, tokenizer, scaled and generator."""
  workdir, result = quickstart
  assert result.code == 0, result.err
  copy = tmp_path_factory.mktemp('runs') / 'quickstart'
  return shutil.copytree(workdir, copy)


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> pathlib.Path:
  """A folder of photographs in two classes, with train/ and val/."""
  folder = tmp_path_factory.mktemp('photos')
  for split in ('train', 'val'):
    for name in ('cat', 'dog'):
      pictures.write(folder / split / name, 4)
  return folder
