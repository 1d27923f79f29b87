"""Where the weights of a network are: in files, or in a repository of the hub.

A source is written as

  ''                  the published place
  'FILE'              a file
  'FILE,FILE'         several, whose arrays are taken together
  'FOLDER'            its files by their published names, or its only one
  'ORG/REPO'          a repository on the Hugging Face hub
  'ORG/REPO@REVISION' a branch, tag or commit of it
"""

import dataclasses
import pathlib
import re

from selfboottok_jax import errors
from selfboottok_jax.pretrained import published as published_lib
from selfboottok_jax.pretrained import weight_files

_REPOSITORY = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?')
# Of a repository whose network has no published names.
_USUAL = ('model.safetensors',)
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class Local:
  """Files on this machine."""

  files: tuple[pathlib.Path, ...]

  @property
  def label(self) -> str:
    """Names them in errors and records."""
    return ', '.join(map(str, self.files))


@dataclasses.dataclass(frozen=True)
class Hub:
  """Files of a repository on the Hugging Face hub.

  Attributes:
    repository: as 'org/name'.
    revision: branch, tag or commit.
    files: their names in the repository.
    inbox: folder in which the same files, brought by hand, are found; None
      where there is no such folder.
  """

  repository: str
  revision: str
  files: tuple[str, ...]
  inbox: pathlib.Path | None = None

  @property
  def label(self) -> str:
    """Names it in errors and records."""
    return f'{self.repository}@{self.revision}'


def resolve(
  name: str,
  source: str,
  published: published_lib.Published | None,
  inbox: pathlib.Path,
) -> Local | Hub:
  """What a source means; the hub is not asked.

  Args:
    name: the network, for errors.
    source: see the module.
    published: where its weights are published; None where nobody publishes any.
    inbox: folder that stands for the published place when it has files: what
      was brought to a machine without network goes there.

  Raises:
    WeightsError: there is no such file, or a folder without the wanted files;
      for '' what to fetch from where, and where to put it.
  """
  if not source:
    return _published(name, published, inbox)
  path = pathlib.Path(source).expanduser()
  if path.is_file():
    return Local((path,))
  if path.is_dir():
    return Local(_in_folder(name, path, published))
  match = _REPOSITORY.fullmatch(source)
  if match and not source.endswith(weight_files.SUFFIXES):
    names = published.files if published else _USUAL
    return Hub(match[1], match[2] or 'main', names)
  several = [pathlib.Path(part).expanduser() for part in source.split(',')]
  missing = [str(part) for part in several if not part.is_file()]
  if missing:
    raise errors.WeightsError(
      f'no weight file at {", ".join(map(repr, missing))}, which {name} was to '
      f'read; write {name}:FILE, {name}:FOLDER or {name}:ORG/REPO of the hub'
    )
  return Local(tuple(several))


def _published(
  name: str, published: published_lib.Published | None, inbox: pathlib.Path
) -> Local | Hub:
  if inbox.is_dir() and any(inbox.iterdir()):
    return Local(_in_folder(name, inbox, published))
  if published is None:
    raise errors.WeightsError(
      f'{name} needs a weight file, and none is published; write {name}:FILE, '
      f'or {name}:random for random weights'
    )
  if published.hub:
    return Hub(published.hub, 'main', published.files, inbox)
  raise errors.WeightsError(
    f'{name} needs {" and ".join(published.files)}, which the hub has not; '
    f'fetch this from {published.url} into {inbox}, or into any folder and '
    f'write {name}:FOLDER'
  )


def _in_folder(
  name: str, folder: pathlib.Path, published: published_lib.Published | None
) -> tuple[pathlib.Path, ...]:
  wanted = published.files if published else ()
  # In the repository's own subfolder, or beside all others.
  places = [(folder / n, folder / pathlib.PurePath(n).name) for n in wanted]
  found = [path for pair in places for path in _first_file(pair)]
  if wanted and len(found) == len(wanted):
    return tuple(found)
  held = sorted(
    p for p in folder.iterdir() if p.suffix in weight_files.SUFFIXES
  )
  # One of several is not enough, but a file of one's own may have it all.
  is_whole = len(wanted) < 2 or held[:1] != [p for p in found if p in held]
  if len(held) == 1 and is_whole:
    return (held[0],)
  listed = ', '.join(path.name for path in held[:_SHOWN]) or 'no weight file'
  asked = f'{" and ".join(wanted)} there' if wanted else 'a single one'
  raise errors.WeightsError(
    f'{folder} has {listed}; {name} wants {asked}: add what is missing, or '
    f'write {name}:FILE (several as FILE,FILE)'
  )


def _first_file(paths: tuple[pathlib.Path, ...]) -> list[pathlib.Path]:
  """The first that exists, or none."""
  return [path for path in paths if path.is_file()][:1]
