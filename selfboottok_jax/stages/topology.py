"""Hardware that need not be there: a named slice of TPUs, or a number of GPUs.

XLA compiles for TPUs on any machine that has libtpu. For GPUs it does not, so a
program is partitioned for as many emulated CPU devices: what each device
computes, holds and exchanges is the same.
"""

import contextlib
import dataclasses
import glob
import importlib.util
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies

from selfboottok_jax import errors
from selfboottok_jax.evaluation import hardware

# The most GPUs that are emulated.
_MOST = 1024
_CHILD = f"""
import pickle, sys
sys.path[:0] = pickle.load(sys.stdin.buffer)
from {__name__} import answer
answer()
"""


@dataclasses.dataclass(frozen=True)
class Topology:
  """Chips that work together.

  Attributes:
    name: as 'v5p:4x4x4' or 'h100:8'.
    chip: what they are.
    size: how many.
    emulated: True if CPU devices stand for them, as they do for GPUs.
  """

  name: str
  chip: hardware.Chip
  size: int
  emulated: bool

  @property
  def num_devices(self) -> int:
    """Number of JAX devices, which the mesh arranges."""
    return self.size * self.chip.devices

  def devices(self) -> list[Any]:
    """The devices, in a process that was started by `call`."""
    if self.emulated:
      return jax.devices('cpu')[: self.num_devices]
    # One device for both cores of a chip, as on the hardware.
    kwargs = {'chip_config_name': 'megacore'} if self.chip.name == 'v4' else {}
    described = topologies.get_topology_desc(
      self.name, platform='tpu', **kwargs
    )
    return list(described.devices)


def parse(name: str) -> Topology:
  """Reads 'CHIP:SIZE'.

  Raises:
    ConfigError: an unknown chip, or a slice that is not sold.
  """
  kind, _, size = name.partition(':')
  chip = hardware.CHIPS.get(kind)
  if chip is None:
    raise errors.ConfigError(
      f'--topology={name}: no chip {kind!r}; wanted CHIP:SIZE, as v5p:4x4x4 or '
      f'h100:8, with one of {", ".join(hardware.CHIPS)}'
    )
  if chip.is_tpu:
    if size not in chip.slices:
      raise errors.ConfigError(
        f'--topology={name}: no slice {size!r} of {kind}; wanted one of '
        f'{", ".join(f"{kind}:{known}" for known in chip.slices)}'
      )
    count = math.prod(int(side) for side in size.split('x'))
    return Topology(name, chip, count, emulated=False)
  count = int(size) if re.fullmatch(r'\d{1,4}', size) else 0
  node = hardware.NODE
  if not 1 <= count <= _MOST or (count > node and count % node):
    raise errors.ConfigError(
      f'--topology={name}: {size!r} is no number of GPUs; wanted 1 to {node}, '
      f'or a multiple of {node} up to {_MOST:,}, as {kind}:{node}'
    )
  return Topology(name, chip, count, emulated=True)


def require_compiler(topology: Topology) -> None:
  """Raises ConfigError if this machine cannot compile for the hardware."""
  if not topology.emulated and importlib.util.find_spec('libtpu') is None:
    raise errors.ConfigError(
      f'--topology={topology.name} compiles for TPUs with libtpu, which is not '
      'installed; pip install selfboottok_jax[tpu] (no TPU is needed), or '
      'choose GPUs, as --topology=h100:8'
    )


def call(
  topology: Topology, function: Callable[..., Any], *arguments: Any
) -> Any:
  """Calls a function in a process of its own, which has the devices.

  libtpu writes to the terminal when it is loaded, and a process decides once
  how many devices it emulates.

  Args:
    topology: the hardware.
    function: of a module; its result must be one that pickle can take.
    *arguments: for the function.

  Returns:
    What the function returns.

  Raises:
    UserError: one that the function raises.
    RuntimeError: any other end of the process; with its last lines.
  """
  with tempfile.TemporaryDirectory() as folder:
    answer_file = os.path.join(folder, 'answer')
    task = (topology, folder, answer_file, function, arguments)
    ended = subprocess.run(
      [sys.executable, '-c', _CHILD],
      input=pickle.dumps(sys.path) + pickle.dumps(task),
      env=os.environ | _environment(topology, folder),
      capture_output=True,
      check=False,
    )
    if not os.path.exists(answer_file):
      lines = ended.stderr.decode(errors='replace').splitlines()
      raise RuntimeError(
        f'the process that compiles for {topology.name} ended with code '
        f'{ended.returncode}:\n' + '\n'.join(lines[-20:])
      )
    with open(answer_file, 'rb') as file:
      result, error = pickle.load(file)
  if error is not None:
    raise error
  return result


def answer() -> None:
  """Does what `call` asks, in the process that it started."""
  topology, folder, answer_file, function, arguments = pickle.load(
    sys.stdin.buffer
  )
  jax.config.update('jax_enable_compilation_cache', False)
  if topology.emulated:
    jax.config.update('jax_num_cpu_devices', topology.num_devices)
  _Dump.folder = folder
  result = error = None
  try:
    result = function(*arguments)
  except errors.UserError as raised:
    error = raised
  with open(answer_file, 'wb') as file:
    pickle.dump((result, error), file)


class _Dump:
  """Holds the folder that XLA dumps the programs of this process to.

  It is empty where XLA dumps none: in every process that `call` did not start.
  """

  folder = ''


@contextlib.contextmanager
def partitioned() -> Iterator[list[str]]:
  """Collects the partitioned program that is compiled inside the block.

  Only in a process that `call` started for emulated devices.

  Yields:
    A list that holds the program's text once the block has ended. It stays
    empty for a single device, whose program is not partitioned.
  """
  found: list[str] = []
  yield found
  for path in glob.glob(os.path.join(_Dump.folder, '*.txt')):
    if 'after_spmd-partitioning' in path:
      with open(path) as file:
        found.append(file.read())
    os.remove(path)


def _environment(topology: Topology, folder: str) -> dict[str, str]:
  """Variables of the process that compiles."""
  variables = {'JAX_PLATFORMS': 'cpu', 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
  if topology.emulated:
    flags = [
      f'--xla_dump_to={folder}',
      '--xla_dump_hlo_as_text',
      '--xla_dump_hlo_module_re=jit_step_fn',
      '--xla_dump_hlo_pass_re=spmd-partitioning',
      # Nobody runs the program.
      '--xla_backend_optimization_level=0',
      '--xla_llvm_disable_expensive_passes=true',
    ]
    return variables | {'XLA_FLAGS': ' '.join(flags)}
  hosts = {'v5e': 'v5litepod', 'tpu7x': 'v7x'}
  kind = hosts.get(topology.chip.name, topology.chip.name)
  return variables | {
    # libtpu would look for a TPU, ask the cloud about it, and let only one
    # process in.
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': f'{kind}-{topology.num_devices}',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'XLA_FLAGS': '',
  }
