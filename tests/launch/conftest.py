"""Photographs that the tests of this folder share."""

import pathlib

import pytest

from tests.launch import pictures


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> pathlib.Path:
  """A folder of photographs in two classes, with train/ and val/."""
  folder = tmp_path_factory.mktemp('photos')
  for split in ('train', 'val'):
    for name in ('cat', 'dog'):
      pictures.write(folder / split / name, 4)
  return folder
