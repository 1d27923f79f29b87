"""A stand-in for Google Cloud Storage: its JSON API, served from memory.

gcsfs, google-cloud-storage and TensorStore all find it by their environment
variables, in this process and in commands that tests start, so nothing of them
is replaced. Like the original it has objects and no folders, an object appears
whole or not at all, and nothing can be appended to one.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import json
import pathlib
import re
import sys
import threading
import traceback
import urllib.parse
import zlib
from collections.abc import Iterator

_OBJECT = r'/(?:download/)?storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)'


@dataclasses.dataclass(frozen=True)
class Stored:
  """Contents of an object, and the number of its writing."""

  data: bytes
  generation: int


class ObjectStore:
  """Objects by 'BUCKET/NAME', and the server that shows them to clients.

  A bucket that nobody made is absent.

  Attributes:
    url: address of the server.
    objects: what is stored now.
    forbidden: buckets that nobody may read or write.
    log: every request so far, as 'METHOD PATH'.
  """

  def __init__(self) -> None:
    """Starts to serve on a free port of this machine, in a thread."""
    self.objects: dict[str, Stored] = {}
    self.buckets: set[str] = set()
    self.forbidden: set[str] = set()
    self.log: list[str] = []
    self.lock = threading.Lock()
    self.uploads: dict[str, tuple[str, bytearray]] = {}
    self.numbers = itertools.count(1)
    handler = type('Bound', (_Handler,), {'store': self})
    self._server = _Server(('127.0.0.1', 0), handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  @property
  def variables(self) -> dict[str, str]:
    """The environment in which clients talk to this server."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      # Neither credentials nor the kind of a bucket are asked for elsewhere.
      'NO_GCE_CHECK': 'true',
      'GCE_METADATA_HOST': self.url.removeprefix('http://'),
      'GOOGLE_CLOUD_PROJECT': 'tests',
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    }

  def make_bucket(self) -> str:
    """Makes a bucket of a new name."""
    name = f'bucket-{next(self.numbers)}'
    self.buckets.add(name)
    return name

  def names(self, url: str) -> list[str]:
    """Names of all objects below gs://BUCKET or gs://BUCKET/NAME, in order."""
    start = f'{url.removeprefix("gs://")}/'
    return sorted(
      n.removeprefix(start) for n in self.objects if n.startswith(start)
    )

  def read(self, url: str) -> bytes:
    """Contents of the object at gs://BUCKET/NAME."""
    return self.objects[url.removeprefix('gs://')].data

  def remove(self, url: str) -> None:
    """Removes the object at gs://BUCKET/NAME."""
    del self.objects[url.removeprefix('gs://')]

  def upload(self, folder: pathlib.Path, url: str) -> None:
    """Copies a folder of this machine, as other programs would."""
    for path in folder.rglob('*'):
      if path.is_file():
        name = path.relative_to(folder).as_posix()
        self.put(f'{url}/{name}', path.read_bytes())

  def put(self, url: str, data: bytes) -> Stored:
    """Stores an object whole."""
    name = url.removeprefix('gs://')
    with self.lock:
      self.objects[name] = Stored(bytes(data), next(self.numbers))
      return self.objects[name]

  def close(self) -> None:
    """Stops serving."""
    self._server.shutdown()
    self._server.server_close()


class _Server(http.server.ThreadingHTTPServer):
  """A server whose clients may hang up."""

  daemon_threads = True

  def handle_error(self, request: object, client_address: object) -> None:
    """Shows errors of the stand-in itself only."""
    if not isinstance(sys.exception(), ConnectionError):
      traceback.print_exc()


class _Handler(http.server.BaseHTTPRequestHandler):
  """One request. `store` is set by the server."""

  protocol_version = 'HTTP/1.1'
  # Headers and contents in one packet, or each answer would take 40 ms.
  wbufsize = -1
  disable_nagle_algorithm = True
  store: ObjectStore

  def log_message(self, format: str, *args: object) -> None:
    """Says nothing on standard error."""

  def do_GET(self) -> None:
    path, query = self._begin()
    if self._is_refused(path):
      return
    if match := re.fullmatch(_OBJECT, path):
      self._get(_name(match), query)
    elif match := re.fullmatch(r'/storage/v1/b/([^/]+)/o/?', path):
      self._list(match[1], query)
    elif match := re.fullmatch(r'/storage/v1/b/([^/]+)', path):
      self._json({'kind': 'storage#bucket', 'name': match[1], 'id': match[1]})
    else:
      self._absent()

  def do_POST(self) -> None:
    path, query = self._begin()
    body = self._body()
    if self._is_refused(path):
      return
    if path.startswith('/batch/'):
      self._batch(body)
    elif 'upload_id' in query:
      self._resume(query['upload_id'], body)
    elif match := re.fullmatch(r'/upload/storage/v1/b/([^/]+)/o/?', path):
      self._upload(match[1], query, body)
    elif match := re.fullmatch(
      rf'{_OBJECT}/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)', path
    ):
      target = f'{match[3]}/{urllib.parse.unquote(match[4])}'
      self._copy(_name(match), target)
    elif match := re.fullmatch(rf'{_OBJECT}/moveTo/o/([^/]+)', path):
      target = f'{match["bucket"]}/{urllib.parse.unquote(match[3])}'
      self._copy(_name(match), target, move=True)
    else:
      self._absent()

  def do_PUT(self) -> None:
    _, query = self._begin()
    self._resume(query['upload_id'], self._body())

  def do_DELETE(self) -> None:
    path, query = self._begin()
    if self._is_refused(path):
      return
    match = re.fullmatch(_OBJECT, path)
    if match is None:
      self._absent()
      return
    name = _name(match)
    if not self._allowed(name, query):
      return
    self._remove(name)

  def do_HEAD(self) -> None:
    self.do_GET()

  def _is_refused(self, path: str) -> bool:
    """Answers 404 or 403 for a bucket that is absent or forbidden."""
    match = re.search(r'/v1/b/([^/]+)', path)
    if match is None or match[1] in self.store.buckets:
      return False
    if match[1] in self.store.forbidden:
      message = f'Caller has no access to {match[1]}'
      self._json({'error': {'code': 403, 'message': message}}, 403)
      return True
    self._absent()
    return True

  def _remove(self, name: str) -> None:
    with self.store.lock:
      found = self.store.objects.pop(name, None)
    if found is None:
      self._absent()
    else:
      self.send_response(204)
      self._end(b'')

  def _begin(self) -> tuple[str, dict[str, str]]:
    """Path, still quoted, and query of the request."""
    self.store.log.append(f'{self.command} {self.path}')
    split = urllib.parse.urlsplit(self.path)
    path = re.sub(r'^//+', '/', split.path)
    return path, dict(urllib.parse.parse_qsl(split.query))

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b''
    while size := int(self.rfile.readline().partition(b';')[0], 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _allowed(self, name: str, query: dict[str, str]) -> bool:
    """Answers 412 or 304 where a condition on the generation fails."""
    stored = self.store.objects.get(name)
    now = str(stored.generation if stored else 0)
    if query.get('ifGenerationMatch', now) != now:
      self._json({'error': {'code': 412, 'message': 'condition'}}, 412)
      return False
    if query.get('ifGenerationNotMatch') == now:
      self.send_response(304)
      self._end(b'')
      return False
    return True

  def _get(self, name: str, query: dict[str, str]) -> None:
    """Contents of an object, or a part of them, or its description."""
    stored = self.store.objects.get(name)
    if stored is None:
      self._absent()
      return
    if not self._allowed(name, query):
      return
    media = query.get('alt') == 'media' or self.path.startswith('/download/')
    if not media:
      self._json(_resource(name, stored))
      return
    data, code, span = stored.data, 200, ''
    match = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if match:
      first, last = match[1], match[2]
      low = int(first) if first else max(0, len(data) - int(last))
      high = min(int(last) + 1, len(data)) if first and last else len(data)
      if low >= len(data):
        self.send_response(416)
        self._end(b'')
        return
      code, span = 206, f'bytes {low}-{high - 1}/{len(data)}'
      data = data[low:high]
    self.send_response(code)
    if span:
      self.send_header('Content-Range', span)
    self.send_header('x-goog-generation', str(stored.generation))
    self.send_header('x-goog-hash', _hashes(stored.data))
    self._end(data)

  def _list(self, bucket: str, query: dict[str, str]) -> None:
    """Names with a prefix, up to the next delimiter where one is given."""
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    first, end = query.get('startOffset', ''), query.get('endOffset', '')
    items, prefixes = [], set()
    with self.store.lock:
      objects = dict(self.store.objects)
    for name in self.store.names(bucket):
      if not name.startswith(prefix) or name < first or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
      else:
        whole = f'{bucket}/{name}'
        items.append(_resource(whole, objects[whole]))
    self._json(
      {
        'kind': 'storage#objects',
        'items': items[: int(query.get('maxResults', len(items)))],
        'prefixes': sorted(prefixes),
      }
    )

  def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
    kind = query.get('uploadType')
    if kind == 'media':
      name, data = query['name'], body
    elif kind == 'multipart':
      (_, about), (_, data) = self._parts(body)
      name = json.loads(about)['name']
    else:
      name = query.get('name') or json.loads(body)['name']
      number = str(next(self.store.numbers))
      self.store.uploads[number] = f'{bucket}/{name}', bytearray()
      self.send_response(200)
      self.send_header(
        'Location',
        f'{self.store.url}/upload/storage/v1/b/{bucket}/o'
        f'?uploadType=resumable&upload_id={number}',
      )
      self._end(b'{}')
      return
    whole = f'{bucket}/{name}'
    if self._allowed(whole, query):
      self._json(_resource(whole, self.store.put(whole, data)))

  def _resume(self, number: str, body: bytes) -> None:
    """Takes a part of a resumable upload; the last one makes the object."""
    name, data = self.store.uploads[number]
    data += body
    if self.headers.get('Content-Range', '').endswith('/*'):
      self.send_response(308)
      if data:
        self.send_header('Range', f'bytes=0-{len(data) - 1}')
      self._end(b'')
      return
    del self.store.uploads[number]
    self._json(_resource(name, self.store.put(name, data)))

  def _copy(self, source: str, target: str, *, move: bool = False) -> None:
    stored = self.store.objects.get(source)
    if stored is None:
      self._absent()
      return
    if move:
      del self.store.objects[source]
    made = _resource(target, self.store.put(target, stored.data))
    self._json({'done': True, 'resource': made, **made})

  def _batch(self, body: bytes) -> None:
    """Several deletions in one request."""
    answers = []
    for number, (_, request) in enumerate(self._parts(body), start=1):
      target = request.decode().split()[1]
      path = urllib.parse.urlsplit(target).path
      match = re.fullmatch(_OBJECT, path)
      assert match is not None, request
      with self.store.lock:
        found = self.store.objects.pop(_name(match), None)
      code = '204 No Content' if found else '404 Not Found'
      answers.append(
        '--answer\r\nContent-Type: application/http\r\nContent-ID: '
        f'<response-{number}>\r\n\r\nHTTP/1.1 {code}\r\n'
        'Content-Length: 0\r\n\r\n\r\n'
      )
    self.send_response(200)
    self.send_header('Content-Type', 'multipart/mixed; boundary=answer')
    self._end((''.join(answers) + '--answer--\r\n').encode())

  def _parts(self, body: bytes) -> list[tuple[bytes, bytes]]:
    """Headers and content of each part of a multipart body."""
    kind = self.headers['Content-Type']
    mark = re.search(r'boundary="?([^";]+)"?', kind)
    assert mark is not None, kind
    between = b'--' + mark[1].encode()
    parts = []
    for part in (b'\n' + body).split(b'\n' + between)[1:-1]:
      head, _, content = re.split(rb'(\r?\n\r?\n)', part, maxsplit=1)
      parts.append((head, content.removesuffix(b'\r')))
    return parts

  def _absent(self) -> None:
    self._json({'error': {'code': 404, 'message': 'Not Found'}}, 404)

  def _json(self, content: object, code: int = 200) -> None:
    self.send_response(code)
    self.send_header('Content-Type', 'application/json')
    self._end(json.dumps(content).encode())

  def _end(self, data: bytes) -> None:
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(data)


def _name(match: re.Match[str]) -> str:
  return f'{match["bucket"]}/{urllib.parse.unquote(match["name"])}'


def _digests(data: bytes) -> tuple[str, str]:
  """MD5 and CRC-32C, as the API writes them; the latter is left out."""
  return base64.b64encode(hashlib.md5(data).digest()).decode(), ''


def _hashes(data: bytes) -> str:
  return f'md5={_digests(data)[0]}'


def _resource(name: str, stored: Stored) -> dict[str, object]:
  bucket, _, key = name.partition('/')
  return {
    'kind': 'storage#object',
    'id': f'{name}/{stored.generation}',
    'bucket': bucket,
    'name': key,
    'generation': str(stored.generation),
    'metageneration': '1',
    'contentType': 'application/octet-stream',
    'size': str(len(stored.data)),
    'md5Hash': _digests(stored.data)[0],
    'etag': hex(zlib.crc32(stored.data)),
    'timeCreated': '2026-01-01T00:00:00.000Z',
    'updated': '2026-01-01T00:00:00.000Z',
  }


@contextlib.contextmanager
def serving() -> Iterator[ObjectStore]:
  """An object store while a block runs."""
  store = ObjectStore()
  try:
    yield store
  finally:
    store.close()
