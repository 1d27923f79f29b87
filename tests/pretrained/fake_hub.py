"""A server on this machine that answers as the Hugging Face hub does."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from unittest import mock

from huggingface_hub import constants

COMMIT = 'c' * 40
# Repositories that answer with an error: status, and code of the error.
REFUSALS = {
  'org/gated': (403, 'GatedRepo'),
  'org/none': (404, 'RepoNotFound'),
  'org/broken': (500, ''),
}


class Hub(http.server.ThreadingHTTPServer):
  """Serves `files` as 'ORG/REPO/resolve/REVISION/FILE'; keeps `asked`."""

  daemon_threads = True

  def __init__(self, files: dict[str, bytes]):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.files, self.asked = files, []

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_port}'


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_HEAD(self):  # noqa: N802 - the name that the base class calls
    self._answer()

  def do_GET(self):  # noqa: N802
    body = self._answer()
    if body is not None:
      self.wfile.write(body)

  def _answer(self) -> bytes | None:
    self.server.asked.append(f'{self.command} {self.path}')
    path = self.path.strip('/')
    repository, _, rest = path.partition('/resolve/')
    body = self.server.files.get(f'{repository}/{rest}')
    if repository in REFUSALS:
      self._refuse(*REFUSALS[repository])
    elif not rest.startswith(('main/', f'{COMMIT}/')):
      self._refuse(404, 'RevisionNotFound')
    elif body is None:
      self._refuse(404, 'EntryNotFound')
    else:
      self.send_response(200)
      self.send_header('ETag', f'"{hashlib.sha256(body).hexdigest()}"')
      self.send_header('X-Repo-Commit', COMMIT)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      return body
    return None

  def _refuse(self, status: int, code: str) -> None:
    self.send_response(status)
    self.send_header('X-Error-Code', code)
    self.send_header('Content-Length', '0')
    self.end_headers()

  def log_message(self, *args) -> None:
    """Keeps quiet."""


@contextlib.contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
  """A running hub; files are named 'ORG/REPO/REVISION/FILE'."""
  # It is asked even where tests are told to keep off the network.
  online = mock.patch.object(constants, 'HF_HUB_OFFLINE', False)
  with online, Hub(files) as server:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
      yield server
    finally:
      server.shutdown()
      thread.join()


def refusing() -> str:
  """The address of a hub that nobody answers at."""
  with Hub({}) as server:
    return server.url
