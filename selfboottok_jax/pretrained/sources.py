"""Places of weights: files, or a repository of the Hugging Face hub.

A source is written as

  ''                  the published place
  'FILE'              a file
  'FILE,FILE'         several, whose arrays are taken together
  'FOLDER'            its files by their published names, or its only one
  'ORG/REPO'          a repository on the Hugging Face hub
  'ORG/REPO@REVISION' a branch, tag or commit of it

`resolve` finds out which of these is meant; `download` fetches from the hub.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import socket
from collections.abc import Iterator
from typing import Any

from selfboottok_jax import errors, files
from selfboottok_jax.pretrained import contract, weight_files

_REPOSITORY = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?')
# Files to fetch from a repository that the user named, where nobody publishes
# the network.
_USUAL = ('model.safetensors',)
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class LocalFiles:
  """Files on this machine."""

  files: tuple[pathlib.Path, ...]

  @property
  def label(self) -> str:
    """Name in errors and records."""
    return ', '.join(map(str, self.files))


@dataclasses.dataclass(frozen=True)
class HubFiles:
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
    """Name in errors and records."""
    return f'{self.repository}@{self.revision}'


def resolve(
  name: str,
  source: str,
  published: contract.Published | None,
  inbox: pathlib.Path,
) -> LocalFiles | HubFiles:
  """The files that a source means; the hub is not asked.

  Args:
    name: the network, for errors.
    source: see the module.
    published: place of its weights; None where none is published.
    inbox: folder that stands for the published place when it has files; files
      that were brought to a machine without network go there.

  Raises:
    WeightsError: there is no such file, or a folder without the wanted files;
      for '', the message names the files to fetch and the folder for them.
  """
  if not source:
    return _published(name, published, inbox)
  several = [
    pathlib.Path(os.path.expanduser(part)) for part in source.split(',')
  ]
  for part in source.split(','):
    if part.startswith('gs:/'):
      files.local_path(name, part, weight_files.ELSEWHERE)
  path = pathlib.Path(os.path.expanduser(source))
  if path.is_file():
    return LocalFiles((path,))
  if path.is_dir():
    return LocalFiles(_in_folder(name, path, published))
  match = _REPOSITORY.fullmatch(source)
  if match and not source.endswith(weight_files.SUFFIXES):
    names = published.files if published else _USUAL
    return HubFiles(match[1], match[2] or 'main', names)
  missing = [str(part) for part in several if not part.is_file()]
  if missing:
    raise errors.WeightsError(
      f'no weight file at {", ".join(map(repr, missing))}, which {name} was to '
      f'read; write {name}:FILE, {name}:FOLDER or {name}:ORG/REPO of the hub'
    )
  return LocalFiles(tuple(several))


def _published(
  name: str, published: contract.Published | None, inbox: pathlib.Path
) -> LocalFiles | HubFiles:
  """The published files, or those in the inbox."""
  if inbox.is_dir() and any(inbox.iterdir()):
    return LocalFiles(_in_folder(name, inbox, published))
  if published is None:
    raise errors.WeightsError(
      f'{name} needs a weight file, and none is published; write {name}:FILE, '
      f'or {name}:random for random weights'
    )
  if published.hub:
    return HubFiles(published.hub, 'main', published.files, inbox)
  raise errors.WeightsError(
    f'{name} needs {" and ".join(published.files)}, which the hub has not; '
    f'fetch this from {published.url} into {inbox}, or into any folder and '
    f'write {name}:FOLDER'
  )


def _in_folder(
  name: str, folder: pathlib.Path, published: contract.Published | None
) -> tuple[pathlib.Path, ...]:
  """The wanted files of a folder, or its only weight file."""
  wanted = published.files if published else ()
  # At its path in the repository, or directly in the folder.
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
  """Lists the first path that is a file; empty if none is."""
  return [path for path in paths if path.is_file()][:1]


def download(
  name: str, place: HubFiles, cache: pathlib.Path
) -> dict[str, pathlib.Path]:
  """The files of a repository, on this machine.

  Files that were downloaded before are taken without asking the hub, so a
  branch that moved on is not noticed: name a revision to have another one.

  Args:
    name: the network, for errors.
    place: files to download.
    cache: folder of earlier downloads, in the layout of huggingface_hub. The
      environment variables HF_ENDPOINT and HF_TOKEN are respected.

  Returns:
    Name in the repository to path.

  Raises:
    WeightsError: any failure; the message names the files to bring by hand, and
      the folder for them.
  """
  # Imported here, since networks at hand need no HTTP client.
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  endpoint = os.environ.get('HF_ENDPOINT') or None
  where: dict[str, Any] = {'revision': place.revision, 'endpoint': endpoint}

  def get(file: str, **options: Any) -> pathlib.Path:
    path = huggingface_hub.hf_hub_download(
      place.repository, file, cache_dir=cache, **where, **options
    )
    return pathlib.Path(path)

  try:
    with _quiet():
      try:
        return {file: get(file, local_files_only=True) for file in place.files}
      except hub_errors.LocalEntryNotFoundError:
        # Ask once: the download itself would go on asking for 20 seconds.
        first = huggingface_hub.hf_hub_url(
          place.repository, place.files[0], **where
        )
        huggingface_hub.get_hf_file_metadata(first, endpoint=endpoint)
        return {file: get(file) for file in place.files}
  # HTTP, TLS, disks, repositories and the packages behind them all raise.
  except Exception as error:
    raise errors.WeightsError(_advice(name, place, cache, error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the hub's client, which logs each attempt: one error is enough."""
  from huggingface_hub import utils

  before = utils.logging.get_verbosity()
  utils.logging.set_verbosity_error()
  try:
    yield
  finally:
    utils.logging.set_verbosity(before)


def _advice(
  name: str, place: HubFiles, cache: pathlib.Path, error: Exception
) -> str:
  """One line: the failure, and the way to bring the files by hand."""
  wanted = ' and '.join(place.files)
  endpoint = os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'
  inbox = f'into {place.inbox}, or ' if place.inbox else ''
  return (
    f'{name} needs {wanted} of {place.label} on the hub, and {_reason(error)}; '
    f'without a connection, fetch {wanted} elsewhere from '
    f'{endpoint}/{place.repository} and put it {inbox}into any folder and '
    f'write {name}:FOLDER (downloads are kept in {cache})'
  )


def _is_unreachable(error: BaseException | None) -> bool:
  """True if a connection failed, however deep below the error."""
  while error is not None:
    # The hub's client has classes of its own for it.
    if isinstance(error, ConnectionError | socket.gaierror | TimeoutError):
      return True
    if type(error).__name__ in ('ConnectError', 'ConnectTimeout'):
      return True
    error = error.__cause__ or error.__context__
  return False


def _reason(error: Exception) -> str:
  """The cause of an error, in a few words without HTTP."""
  from huggingface_hub import errors as hub_errors

  kinds = (
    (
      hub_errors.GatedRepoError,
      'its terms were not accepted: accept them on its page, then set HF_TOKEN',
    ),
    (
      hub_errors.RepositoryNotFoundError,
      'there is no such repository, or it is private and HF_TOKEN not of one '
      'who may read it',
    ),
    (hub_errors.RevisionNotFoundError, 'it has no such revision'),
    (hub_errors.RemoteEntryNotFoundError, 'it has no such file'),
    (hub_errors.LocalEntryNotFoundError, 'the hub could not be reached'),
  )
  for kind, words in kinds:
    if isinstance(error, kind):
      return words
  if _is_unreachable(error):
    return 'the hub could not be reached'
  return f'the download failed ({" ".join(str(error).split())[:200]})'
