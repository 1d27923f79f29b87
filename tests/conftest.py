"""Eight fake devices, checked types and shapes, one compilation cache.

And a tiny run of every task, made once for all tests that read them.
"""

import ctypes
import dataclasses
import fcntl
import gc
import importlib.util
import inspect
import json
import os
import pathlib
import shutil
import signal
from collections.abc import Iterator
from importlib import metadata

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Commands that tests start read it too.
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR',
  str(pathlib.Path(__file__).parents[1] / '.cache' / 'jax'),
)
os.environ['XLA_FLAGS'] = ' '.join(
  [
    # Tests compile much and compute little: a quarter less time without LLVM's
    # optimisations.
    '--xla_backend_optimization_level=0',
    # A tenth less without these.
    '--xla_llvm_disable_expensive_passes=true',
    '--xla_cpu_parallel_codegen_split_count=1',
    # And a third less with the plainer fusions that jaxlib 0.10 still has.
    *(
      ['--xla_cpu_use_fusion_emitters=false']
      if metadata.version('jaxlib').startswith('0.10.')
      else []
    ),
    # Eight devices on two busy cores wait long for each other.
    '--xla_cpu_collective_call_warn_stuck_timeout_seconds=600',
    '--xla_cpu_collective_call_terminate_timeout_seconds=900',
    # Flags that the caller set come last and so win.
    os.environ.get('XLA_FLAGS', ''),
  ]
)

import jax
import jaxtyping
import pytest

from tests import object_store
from tests.launch import commands, pictures

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Single operations too: both workers need them, and so do commands.
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

# A background job of a shell ignores interrupts, one of nohup hang-ups, and so
# would every command that a test starts and stops.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
  signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Held for the whole run: annotations are checked wherever tests go.
jaxtyping.install_import_hook('selfboottok_jax', 'beartype.beartype')

# Programs stay in memory as long as JAX knows them; beyond this many bytes of
# a process they are dropped, and what is wanted again comes from the cache.
_ROOM = 1_200_000_000


# Costly files first, so that no worker waits long for the other's last one. One
# worker makes the runs that many files read while the other is elsewhere.
_ORDER = (
  *('launch/quickstart', 'stages', 'launch', 'inference', 'golden'),
  *('pretrained', 'models', 'evaluation'),
)


def pytest_collection_modifyitems(items) -> None:
  """Orders the files; those of one folder stay as they are."""

  def rank(item) -> int:
    parts = (i for i, p in enumerate(_ORDER) if f'tests/{p}' in item.nodeid)
    return next(parts, len(_ORDER))

  items.sort(key=rank)


def pytest_collection_finish(session) -> None:
  """Exempts the objects that imports made from garbage collection."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item) -> None:
  """Two workers share a small machine."""
  if _resident_bytes() > _ROOM:
    jax.clear_caches()
    gc.collect()
    # glibc keeps freed memory else.
    ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes() -> int:
  """Memory of this process; 0 where the system has no /proc."""
  statistics = pathlib.Path('/proc/self/statm')
  if not statistics.exists():
    return 0
  return int(statistics.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


@pytest.fixture(scope='session', autouse=True)
def weights_cache(tmp_path_factory) -> pathlib.Path:
  """Imported weights stay out of the user's own cache."""
  folder = tmp_path_factory.mktemp('weights_cache')
  os.environ['SELFBOOTTOK_CACHE'] = str(folder)
  return folder


@pytest.fixture(scope='session')
def store() -> Iterator[object_store.ObjectStore]:
  """What gs:// leads to, here and in commands that get its variables."""
  if importlib.util.find_spec('gcsfs') is None:
    pytest.skip('gcsfs is not installed; pip install -r requirements-test.txt')
  with object_store.serving() as store:
    # Before the clients are imported, which read them then.
    os.environ.update(store.variables)
    yield store


@pytest.fixture
def bucket(store) -> str:
  """gs://NAME of a bucket of the test's own."""
  return f'gs://{store.make_bucket()}'


@pytest.fixture(scope='session')
def photos(tmp_path_factory) -> pathlib.Path:
  """A folder of photographs in two classes, with train/ and val/."""
  folder = tmp_path_factory.mktemp('photos')
  for split in ('train', 'val'):
    for name in ('cat', 'dog'):
      pictures.write(folder / split / name, 4)
  return folder


@pytest.fixture(scope='session')
def server(tmp_path_factory) -> commands.Server:
  return commands.Server(tmp_path_factory.mktemp('outputs'))


@pytest.fixture(scope='session')
def runs(server, tmp_path_factory) -> pathlib.Path:
  """This worker's own softvq, tokenizer, scaled and generator.

  They were not trained, see `tests/launch/untrained.py`. Under xdist the first
  worker that asks makes them, and the others wait for it and take a copy.
  """
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  workdir, ended = folder / 'untrained', folder / 'untrained.json'
  with (folder / 'untrained.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not ended.exists():
      result = server.run('tests.launch.untrained', str(workdir))
      ended.write_text(json.dumps(dataclasses.asdict(result)))
  result = commands.Result(**json.loads(ended.read_text()))
  assert result.code == 0, result.err
  copy = tmp_path_factory.mktemp('runs') / 'quickstart'
  return shutil.copytree(workdir, copy)


@pytest.fixture(scope='session')
def unchecked():
  """Calls a method without the checks of types that only tests have."""

  def call(method, *args, **kwargs):
    return inspect.unwrap(method.__func__)(method.__self__, *args, **kwargs)

  return call
