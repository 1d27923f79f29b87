"""Layers of the torch networks that are written for comparisons alone.

Parts have the names that they have in our modules, so that `load` finds the
array of each parameter by its name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-6  # of every LayerNorm


class Attention(nn.Module):
  """Attention of x [b, k, d] to itself, or to a context [b, m, d]."""

  def __init__(self, width: int, heads: int, *, crosses: bool = False):
    super().__init__()
    self.heads, self.crosses = heads, crosses
    if crosses:
      self.query = nn.Linear(width, width)
      self.key_value = nn.Linear(width, 2 * width)
    else:
      self.qkv = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)

  def forward(
    self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
  ) -> Tensor:
    """`mask` [k, m] is True where a query (row) may see a key (column)."""
    b, k, d = x.shape
    if self.crosses:
      assert context is not None
      parts = (self.query(x), *self.key_value(context).chunk(2, dim=-1))
    else:
      parts = self.qkv(x).chunk(3, dim=-1)
    query, key, value = (
      part.view(b, -1, self.heads, d // self.heads).transpose(1, 2)
      for part in parts
    )
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return self.out(mixed.transpose(1, 2).reshape(b, k, d))


class Mlp(nn.Module):
  """Linear, GELU ('none' is the exact one, or 'tanh'), Linear."""

  def __init__(self, width: int, *, ratio: float = 4.0, gelu: str = 'none'):
    super().__init__()
    self.gelu = gelu
    self.up = nn.Linear(width, round(ratio * width))
    self.down = nn.Linear(round(ratio * width), width)

  def forward(self, x: Tensor) -> Tensor:
    return self.down(F.gelu(self.up(x), approximate=self.gelu))


class Block(nn.Module):
  """Pre-norm attention and MLP; with a gain of each where `gain` is not 0."""

  def __init__(
    self, width: int, heads: int, *, gain: float = 0.0, gelu: str = 'none'
  ):
    super().__init__()
    self.norm1 = nn.LayerNorm(width, eps=EPSILON)
    self.attn = Attention(width, heads)
    self.norm2 = nn.LayerNorm(width, eps=EPSILON)
    self.mlp = Mlp(width, gelu=gelu)
    gains = [nn.Parameter(torch.full((width,), gain)) for _ in range(2)]
    self.scale1, self.scale2 = gains if gain else (None, None)

  def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = x + _times(self.attn(self.norm1(x), mask=mask), self.scale1)
    return x + _times(self.mlp(self.norm2(x)), self.scale2)


def _times(branch: Tensor, gain: Tensor | None) -> Tensor:
  return branch if gain is None else branch * gain


class Projector(nn.Module):
  """Three linear layers with SiLU between them, of each token alone."""

  def __init__(self, inputs: int, features: int, width: int):
    super().__init__()
    self.layer0 = nn.Linear(inputs, width)
    self.layer1 = nn.Linear(width, width)
    self.layer2 = nn.Linear(width, features)

  def forward(self, z: Tensor) -> Tensor:
    return self.layer2(F.silu(self.layer1(F.silu(self.layer0(z)))))


def normal(*shape: int) -> nn.Parameter:
  """A parameter of small random numbers."""
  return nn.Parameter(0.02 * torch.randn(shape))


def patchify(images: Tensor, size: int) -> Tensor:
  """Patches [b, n, size * size * c], channels last, of images [b, c, h, w]."""
  b, c, h, w = images.shape
  x = images.view(b, c, h // size, size, w // size, size)
  return x.permute(0, 2, 4, 3, 5, 1).reshape(b, -1, size * size * c)


def unpatchify(patches: Tensor, size: int) -> Tensor:
  """Square images [b, 3, h, w]; the inverse of `patchify`."""
  b, n, _ = patches.shape
  side = round(n**0.5)
  x = patches.view(b, side, side, size, size, 3).permute(0, 5, 1, 3, 2, 4)
  return x.reshape(b, 3, side * size, side * size)


def count(network: nn.Module) -> int:
  """The number of parameters."""
  return sum(parameter.numel() for parameter in network.parameters())


def load(network: nn.Module, params: Mapping[str, Any]) -> None:
  """Copies the parameters of our module, or gradients of their shapes."""
  arrays = dict(_named(params))
  missing = arrays.keys() ^ dict(network.named_parameters()).keys()
  assert not missing, sorted(missing)
  with torch.no_grad():
    for name, parameter in network.named_parameters():
      parameter.copy_(torch.from_numpy(np.array(arrays[name])))


def _named(
  params: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, np.ndarray]]:
  """Arrays as torch lays them out, under the names that they have there."""
  for key, value in params.items():
    if key.startswith('blocks'):
      # A stack of blocks, named by the first: each array has a row for each.
      _, _, first = key.partition('_')
      for name, rows in _flat(value['block']):
        for index, row in enumerate(rows, int(first or 0)):
          yield _renamed(f'{prefix}blocks.{index}.{name}', row)
    elif isinstance(value, Mapping):
      yield from _named(value, f'{prefix}{key}.')
    else:
      yield _renamed(prefix + key, value)


def _flat(
  tree: Mapping[str, Any], prefix: str = ''
) -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield prefix + key, value


def _renamed(name: str, array: Any) -> tuple[str, np.ndarray]:
  prefix, dot, last = name.rpartition('.')
  # Kernels go from inputs to outputs, torch's weights the other way.
  array = np.array(array).T if last == 'kernel' else np.array(array)
  if last in ('kernel', 'scale', 'embedding'):
    last = 'weight'
  return prefix + dot + last, array
