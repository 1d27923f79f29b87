"""Accelerators: what they compute, hold and move, from vendors' data sheets.

Sources: Google Cloud's pages of TPU v4, v5e, v5p, v6e and TPU7x ("peak compute
per chip", "HBM capacity and bandwidth", "inter-chip interconnect bandwidth",
"supported configurations"); NVIDIA's data sheets of A100, H100, H200, B200, L4
and L40S (dense tensor core rates: half of those printed "with sparsity").
"""

import dataclasses
from collections.abc import Mapping

GIB = 2.0**30
# GPUs whose links reach each other at full speed: those of one machine.
NODE = 8
# The part of a GPU's memory that JAX takes by default.
GPU_SHARE = 0.75
# Types of float32 products, at the DEFAULT, HIGH and HIGHEST of
# `jax.lax.Precision`.
FLOAT32 = ('float32', 'float32 high', 'float32 highest')


@dataclasses.dataclass(frozen=True)
class Chip:
  """An accelerator.

  Attributes:
    name: as in `--topology=NAME:SIZE`.
    kinds: what JAX calls its devices (`device_kind`).
    peak: dense bfloat16 operations per second.
    float32: operations per second of float32 products, by precision, see
      `FLOAT32`.
    memory: bytes of its memory.
    usable: those that a program can have. Of a TPU: what libtpu's compiler
      grants (0.0.52); of a GPU: the share that JAX takes unless
      XLA_CLIENT_MEM_FRACTION says otherwise.
    bandwidth: bytes per second between memory and cores.
    link: bytes per second that it receives over all its links to neighbours, in
      one direction.
    network: bytes per second that it receives from other machines.
    devices: JAX devices that a chip is.
    tile: rows and columns of a TPU's matrix unit; 0 where no padding to them
      counts.
    slices: sizes that are sold, as '4x4x4'; () where any number of chips can
      work together.
  """

  name: str
  kinds: tuple[str, ...]
  peak: float
  float32: Mapping[str, float]
  memory: float
  usable: float
  bandwidth: float
  link: float
  network: float = 0.0
  devices: int = 1
  tile: int = 0
  slices: tuple[str, ...] = ()

  @property
  def is_tpu(self) -> bool:
    """True if XLA can compile for it on a machine that has none."""
    return bool(self.slices)

  def rate(self, kind: str) -> float:
    """Operations per second of products of a type, as 'bfloat16'.

    Args:
      kind: a type's name, with the precision behind it, see `FLOAT32`. Types of
        two bytes are as fast as bfloat16. Of float64 no data sheet speaks: it
        is taken to be as slow as the slowest float32.
    """
    if kind in self.float32:
      return self.float32[kind]
    return self.float32[FLOAT32[-1]] if kind == 'float64' else self.peak


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
  *('8x8x16', '8x16x16'),
)


def _tpu(
  name: str,
  kinds: tuple[str, ...],
  peak: float | int,
  memory: float | int,
  usable: float | int,
  bandwidth: float | int,
  both_ways: float | int,
  slices: tuple[str, ...],
  devices: int = 1,
) -> Chip:
  """A TPU; in teraflops, gibibytes, and gigabytes per second.

  Its links are named by what flows both ways. It makes float32 products of
  bfloat16 ones: 1, 3 or 6 of them, by precision.
  """
  passes = dict(zip(FLOAT32, (1, 3, 6), strict=True))
  return Chip(
    name,
    kinds,
    peak * 1e12,
    {kind: peak * 1e12 / count for kind, count in passes.items()},
    memory * GIB,
    usable * GIB,
    bandwidth * 1e9,
    both_ways / 2 * 1e9,
    devices=devices,
    tile=256 if name in ('v6e', 'tpu7x') else 128,
    slices=slices,
  )


def _gpu(
  name: str,
  kinds: tuple[str, ...],
  peak: float | int,
  tf32: float | int,
  fp32: float | int,
  memory: float | int,
  bandwidth: float | int,
  both_ways: float | int,
  network: float | int,
) -> Chip:
  """A GPU; in teraflops, gigabytes, and gigabytes per second.

  XLA makes float32 products in TF32 unless they ask for HIGHEST.
  """
  rates = dict(zip(FLOAT32, (tf32, tf32, fp32), strict=True))
  return Chip(
    name,
    kinds,
    peak * 1e12,
    {kind: rate * 1e12 for kind, rate in rates.items()},
    memory * 1e9,
    memory * 1e9 * GPU_SHARE,
    bandwidth * 1e9,
    both_ways / 2 * 1e9,
    network * 1e9,
  )


# fmt: off
CHIPS = {
  chip.name: chip
  for chip in (
    # peak, memory, usable, bandwidth, links.
    _tpu('v4', ('TPU v4',), 275, 32, 30.75, 1200, 600, _CUBES),
    _tpu('v5e', ('TPU v5 lite', 'TPU v5e'), 197, 16, 15.75, 819, 400, _FLAT),
    _tpu('v5p', ('TPU v5', 'TPU v5p'), 459, 95, 95, 2765, 1200, _CUBES),
    _tpu('v6e', ('TPU v6 lite', 'TPU v6e'), 918, 32, 31.24, 1638, 800, _FLAT),
    _tpu('tpu7x', ('TPU7x',), 2307, 192, 189.48, 7380, 1200, _CUBES, devices=2),
    # peak, TF32, float32, memory, bandwidth, links, network.
    _gpu('a100-40', ('NVIDIA A100-SXM4-40GB',), 312, 156, 19.5, 40, 1555, 600,
         25),
    _gpu('a100', ('NVIDIA A100-SXM4-80GB',), 312, 156, 19.5, 80, 2039, 600,
         25),
    _gpu('a100-pcie-40', ('NVIDIA A100-PCIE-40GB',), 312, 156, 19.5, 40, 1555,
         64, 25),
    _gpu('a100-pcie', ('NVIDIA A100 80GB PCIe',), 312, 156, 19.5, 80, 1935, 64,
         25),
    _gpu('h100', ('NVIDIA H100 80GB HBM3',), 989, 494.5, 67, 80, 3350, 900, 50),
    _gpu('h100-pcie', ('NVIDIA H100 PCIe',), 756, 378, 51, 80, 2000, 128, 50),
    _gpu('h100-nvl', ('NVIDIA H100 NVL',), 835, 417.5, 60, 94, 3900, 600, 50),
    _gpu('h200', ('NVIDIA H200',), 989, 494.5, 67, 141, 4800, 900, 50),
    _gpu('b200', ('NVIDIA B200',), 2250, 1125, 75, 180, 7700, 1800, 50),
    _gpu('l4', ('NVIDIA L4',), 121, 60, 30.3, 24, 300, 64, 12.5),
    _gpu('l40s', ('NVIDIA L40S',), 362, 183, 91.6, 48, 864, 64, 25),
  )
}
# fmt: on
