"""SiT and REG on 1D tokens in torch, written for the comparison alone."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import torch_parts

TIME_FEATURES = 256


def sincos_1d(length: int, width: int) -> Tensor:
  """A table of positions [length, width]: sines in even columns, cosines."""
  frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
  angle = torch.arange(length)[:, None] * frequency
  return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


def _shift_and_scale(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
  return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
  """Attention and MLP, modulated by a condition."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.modulation = nn.Linear(width, 6 * width)
    self.attn = torch_parts.Attention(width, heads)
    self.mlp = torch_parts.Mlp(width, gelu='tanh')

  def forward(self, x: Tensor, condition: Tensor) -> Tensor:
    width, epsilon = x.shape[-1:], torch_parts.EPSILON
    modulation = self.modulation(F.silu(condition)).chunk(6, dim=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    h = F.layer_norm(x, width, eps=epsilon)
    h = self.attn(_shift_and_scale(h, shift1, scale1))
    x = x + gate1.unsqueeze(1) * h
    h = F.layer_norm(x, width, eps=epsilon)
    h = self.mlp(_shift_and_scale(h, shift2, scale2))
    return x + gate2.unsqueeze(1) * h


class Output(NamedTuple):
  """Predictions for noisy tokens.

  Attributes:
    tokens: velocity of the tokens [b, k, e].
    cls: velocity of the class token [b, c]; None without one.
    aligned: hidden [class token; tokens] at the teacher's width; None without
      alignment.
  """

  tokens: Tensor
  cls: Tensor | None
  aligned: Tensor | None


class SiT(nn.Module):
  """The velocity of noisy tokens [b, k, e] at times [b] for labels [b].

  Arguments are fields of our SiT; a class token is as wide as the teacher's
  patches, so that both share a projector.
  """

  def __init__(
    self,
    num_tokens: int,
    token_dim: int,
    num_classes: int,
    width: int,
    depth: int,
    heads: int,
    *,
    cls_dim: int = 0,
    align_dim: int = 0,
    align_depth: int = 8,
    projector_width: int = 2048,
  ):
    super().__init__()
    assert cls_dim in (0, align_dim), (cls_dim, align_dim)
    self.align_depth = align_depth if align_dim else 0
    self.num_classes = num_classes
    table = sincos_1d(num_tokens, width)[None]
    self.register_buffer('positions', table, persistent=False)
    self.token_embed = nn.Linear(token_dim, width)
    self.time0 = nn.Linear(TIME_FEATURES, width)
    self.time1 = nn.Linear(width, width)
    self.label_table = nn.Embedding(num_classes + 1, width)
    self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
    self.modulation = nn.Linear(width, 2 * width)
    self.to_velocity = nn.Linear(width, token_dim)
    self.has_cls = bool(cls_dim)
    if cls_dim:
      self.cls_embed = nn.Linear(cls_dim, width)
      self.cls_norm = nn.LayerNorm(width, eps=torch_parts.EPSILON)
      self.to_cls_velocity = nn.Linear(width, cls_dim)
    if align_dim:
      self.projector = torch_parts.Projector(width, align_dim, projector_width)

  def forward(
    self, x: Tensor, t: Tensor, labels: Tensor, cls: Tensor | None = None
  ) -> Output:
    half = TIME_FEATURES // 2
    steps = torch.arange(half, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(1e4) * steps / half)
    features = torch.cat([angle.cos(), angle.sin()], dim=-1)
    condition = self.time1(F.silu(self.time0(features)))
    condition = condition + self.label_table(labels)
    h = self.token_embed(x) + self.positions
    if self.has_cls:
      first = self.cls_norm(self.cls_embed(cls))
      h = torch.cat([first[:, None], h], dim=1)
    aligned = None
    for index, block in enumerate(self.blocks, 1):
      h = block(h, condition)
      if index == self.align_depth:
        aligned = self.projector(h)
    shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=-1)
    h = F.layer_norm(h, h.shape[-1:], eps=torch_parts.EPSILON)
    h = _shift_and_scale(h, shift, scale)
    if not self.has_cls:
      return Output(self.to_velocity(h), None, aligned)
    return Output(
      self.to_velocity(h[:, 1:]), self.to_cls_velocity(h[:, 0]), aligned
    )
