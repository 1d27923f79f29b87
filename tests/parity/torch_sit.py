"""SiT on 1D tokens in torch, written for the comparison alone."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TIME_FEATURES = 256
EPSILON = 1e-6


def _shift_and_scale(x, shift, scale):
  return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
  """Attention and MLP, modulated by a condition."""

  def __init__(self, width: int, heads: int, ratio: int = 4):
    super().__init__()
    self.heads = heads
    self.modulation = nn.Linear(width, 6 * width)
    self.qkv = nn.Linear(width, 3 * width)
    self.out = nn.Linear(width, width)
    self.up = nn.Linear(width, ratio * width)
    self.down = nn.Linear(ratio * width, width)

  def forward(self, x, condition):
    width = x.shape[-1:]
    modulation = self.modulation(F.silu(condition)).chunk(6, dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    h = F.layer_norm(x, width, eps=EPSILON)
    h = self.attend(_shift_and_scale(h, shift1, scale1))
    x = x + gate1.unsqueeze(1) * h
    h = F.layer_norm(x, width, eps=EPSILON)
    h = self.up(_shift_and_scale(h, shift2, scale2))
    h = self.down(F.gelu(h, approximate='tanh'))
    return x + gate2.unsqueeze(1) * h

  def attend(self, x):
    b, k, d = x.shape
    qkv = self.qkv(x).view(b, k, 3, self.heads, d // self.heads)
    q, k_, v = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(q, k_, v)
    return self.out(mixed.transpose(1, 2).reshape(b, k, d))


class SiT(nn.Module):
  """The velocity of noisy tokens [b, k, e] at times [b] for labels [b]."""

  def __init__(self, positions, token_dim, num_classes, width, depth, heads):
    super().__init__()
    self.register_buffer('positions', torch.from_numpy(positions)[None])
    self.embed = nn.Linear(token_dim, width)
    self.time0 = nn.Linear(TIME_FEATURES, width)
    self.time1 = nn.Linear(width, width)
    self.labels = nn.Embedding(num_classes + 1, width)
    self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
    self.modulation = nn.Linear(width, 2 * width)
    self.velocity = nn.Linear(width, token_dim)

  def forward(self, x, t, labels):
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(1e4) * torch.arange(half) / half)
    angle = t[:, None] * frequency
    features = torch.cat([angle.cos(), angle.sin()], dim=-1)
    condition = self.time1(F.silu(self.time0(features))) + self.labels(labels)
    h = self.embed(x) + self.positions
    for block in self.blocks:
      h = block(h, condition)
    shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
    h = F.layer_norm(h, h.shape[-1:], eps=EPSILON)
    return self.velocity(_shift_and_scale(h, shift, scale))


_OUTER = {
  'embed': 'token_embed',
  'time0': 'time0',
  'time1': 'time1',
  'modulation': 'modulation',
  'velocity': 'to_velocity',
}
_INNER = {
  'modulation': ('modulation',),
  'qkv': ('attn', 'qkv'),
  'out': ('attn', 'out'),
  'up': ('mlp', 'up'),
  'down': ('mlp', 'down'),
}


def load(network: SiT, params) -> None:
  """Copies the parameters of our SiT, or gradients of their shapes."""
  with torch.no_grad():
    network.labels.weight.copy_(_tensor(params['label_table']['embedding']))
    for theirs, ours in _OUTER.items():
      _load_linear(getattr(network, theirs), params[ours])
    stacked = params['blocks_0']['block']
    for index, block in enumerate(network.blocks):
      for theirs, path in _INNER.items():
        tree = stacked
        for name in path:
          tree = tree[name]
        layer = {name: leaf[index] for name, leaf in tree.items()}
        _load_linear(getattr(block, theirs), layer)


def _load_linear(linear: nn.Linear, layer) -> None:
  linear.weight.copy_(_tensor(layer['kernel']).T)
  linear.bias.copy_(_tensor(layer['bias']))


def _tensor(array) -> torch.Tensor:
  return torch.from_numpy(np.array(array))
