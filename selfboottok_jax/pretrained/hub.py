"""Downloads from the Hugging Face hub, and what to do where they fail."""

import contextlib
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from selfboottok_jax import errors
from selfboottok_jax.pretrained import sources


def download(
  name: str, place: sources.Hub, cache: pathlib.Path
) -> dict[str, pathlib.Path]:
  """The files of a repository, on this machine.

  Files that were downloaded before are taken without asking the hub, so a
  branch that moved on is not noticed: name a revision to have another one.

  Args:
    name: the network, for errors.
    place: what to download.
    cache: folder of earlier downloads, in the layout of huggingface_hub. The
      environment's HF_ENDPOINT and HF_TOKEN count.

  Returns:
    Name in the repository to path.

  Raises:
    WeightsError: for whatever reason; it tells which files to bring by hand,
      and where to put them.
  """
  # Only here: a network at hand needs no HTTP client.
  import huggingface_hub
  from huggingface_hub import errors as hub_errors

  endpoint = os.environ.get('HF_ENDPOINT') or None
  where = {'revision': place.revision, 'endpoint': endpoint}

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
        # It asks once, where the download would go on asking for 20 seconds.
        first = huggingface_hub.hf_hub_url(
          place.repository, place.files[0], **where
        )
        huggingface_hub.get_hf_file_metadata(first, endpoint=endpoint)
        return {file: get(file) for file in place.files}
  # Of HTTP, TLS, disks, repositories, and of packages that these use.
  except Exception as error:
    raise errors.WeightsError(_advice(name, place, cache, error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Leaves the telling to this module: one line, not one for each attempt."""
  from huggingface_hub import utils

  before = utils.logging.get_verbosity()
  utils.logging.set_verbosity_error()
  try:
    yield
  finally:
    utils.logging.set_verbosity(before)


def _advice(
  name: str, place: sources.Hub, cache: pathlib.Path, error: Exception
) -> str:
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
  """Whether a connection failed, however deep below the error."""
  while error is not None:
    # huggingface_hub's own client has errors of its own kind for it.
    if isinstance(error, ConnectionError | socket.gaierror | TimeoutError):
      return True
    if type(error).__name__ in ('ConnectError', 'ConnectTimeout'):
      return True
    error = error.__cause__ or error.__context__
  return False


def _reason(error: Exception) -> str:
  """What went wrong, in a few words that need no HTTP."""
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
