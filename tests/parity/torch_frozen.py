"""The networks beside the tokenizer in torch: teachers, LPIPS, critic's heads.

Written for the comparison alone; weights are random.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import torch_parts

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SLOPE = 0.2  # of leaky ReLUs below zero


class Vit(nn.Module):
  """A vision transformer on images [b, 3, h, w] in [-1, 1].

  Images of another size are resized, or their middle is cut out (`cuts`). The
  result is the patches after the last norm or, with `taps`, the sum of class
  token and patches after each of so many blocks.
  """

  def __init__(
    self,
    *,
    grid: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    cls: bool = True,
    gain: float = 0.0,
    gelu: str = 'none',
    taps: tuple[int, ...] = (),
    cuts: bool = False,
  ):
    super().__init__()
    self.grid, self.patch_size, self.taps = grid, patch_size, taps
    self.cuts, self.has_cls = cuts, cls
    self.patch_embed = nn.Linear(3 * patch_size**2, width)
    self.positions = torch_parts.normal(1, grid**2, width)
    if cls:
      self.cls = torch_parts.normal(1, 1, width)
    self.blocks = nn.ModuleList(
      [
        torch_parts.Block(width, heads, gain=gain, gelu=gelu)
        for _ in range(depth)
      ]
    )
    self.norm = nn.LayerNorm(width, eps=torch_parts.EPSILON)
    # Of images in [-1, 1].
    shift = [2 * mean - 1 for mean in MEAN]
    scale = [2 * deviation for deviation in DEVIATION]
    for name, values in (('shift', shift), ('scale', scale)):
      numbers = torch.tensor(values).view(3, 1, 1)
      self.register_buffer(name, numbers, persistent=False)

  def forward(self, images: Tensor) -> Tensor | list[Tensor]:
    x = (self._fit(images) - self.shift) / self.scale
    x = torch_parts.patchify(x.to(self.positions.dtype), self.patch_size)
    x = self.patch_embed(x) + self.positions
    if self.has_cls:
      x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
    hidden = [x]
    for block in self.blocks:
      hidden.append(block(hidden[-1]))
    if not self.taps:
      return self.norm(hidden[-1])[:, -(self.grid**2) :]
    read = [hidden[tap] for tap in self.taps]
    return [tokens[:, 1:] + tokens[:, :1] for tokens in read]

  def _fit(self, images: Tensor) -> Tensor:
    side = self.grid * self.patch_size
    if images.shape[-1] == side:
      return images
    if not self.cuts:
      return F.interpolate(images, (side, side), mode='bicubic')
    first = (images.shape[-1] - side) // 2
    cut = slice(first, first + side)
    return images[:, :, cut, cut]


class Lpips(nn.Module):
  """Distance of features of VGG16, tapped at the end of each stage."""

  def __init__(self, widths: Sequence[int]):
    super().__init__()
    self.stages, inputs = nn.ModuleList(), 3
    for stage, width in enumerate(widths):
      layers: list[nn.Module] = [nn.MaxPool2d(2)] if stage else []
      for _ in range(2 if stage < 2 else 3):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        inputs = width
      self.stages.append(nn.Sequential(*layers))
    # Released heads are not negative.
    self.heads = nn.ParameterList(
      [nn.Parameter(torch.rand(width)) for width in widths]
    )
    shift, scale = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
    for name, values in (('shift', shift), ('scale', scale)):
      numbers = torch.tensor(values).view(3, 1, 1)
      self.register_buffer(name, numbers, persistent=False)

  def forward(self, fake: Tensor, real: Tensor) -> Tensor:
    """The mean distance of images in [-1, 1]; `real` gets no gradient."""
    with torch.no_grad():
      expected = self.taps(real)
    # The sums and differences are float32.
    return sum(
      torch.einsum(
        'bchw,c->bhw',
        (_unit(actual.float()) - _unit(wanted.float())).square(),
        head.float(),
      ).mean()
      for actual, wanted, head in zip(
        self.taps(fake), expected, self.heads, strict=True
      )
    )

  def taps(self, images: Tensor) -> list[Tensor]:
    """Activations [b, c, h, w] at the end of each stage."""
    x = (images - self.shift) / self.scale
    x = x.to(self.heads[0].dtype, memory_format=torch.channels_last)
    found = []
    for stage in self.stages:
      x = stage(x)
      found.append(x)
    return found


def _unit(x: Tensor) -> Tensor:
  # Under the root: its gradient at 0 is infinite.
  return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + 1e-10)


class SpectralConv(nn.Module):
  """A circular convolution [b, d, n] with a kernel of spectral norm 1."""

  def __init__(self, inputs: int, outputs: int, size: int):
    super().__init__()
    bound = 1 / math.sqrt(inputs * size)
    shape = outputs, inputs, size
    self.weight = nn.Parameter(bound * (2 * torch.rand(shape) - 1))
    self.bias = nn.Parameter(torch.zeros(outputs))
    self.register_buffer('u', F.normalize(torch.randn(outputs), dim=0))

  def forward(self, x: Tensor) -> Tensor:
    # The norm is float32.
    with torch.autocast(x.device.type, enabled=False):
      matrix = self.weight.flatten(1)
      with torch.no_grad():
        v = F.normalize(self.u @ matrix, dim=0)
        u = F.normalize(matrix @ v, dim=0)
        self.u.copy_(u)
      weight = self.weight / (u @ (matrix @ v))
    around = self.weight.shape[-1] // 2
    if around:
      x = torch.cat([x[..., -around:], x, x[..., :around]], dim=-1)
    return F.conv1d(x, weight, self.bias)


class Layer(nn.Module):
  """Convolution, batch norm, leaky ReLU."""

  def __init__(self, width: int, size: int):
    super().__init__()
    self.conv = SpectralConv(width, width, size)
    self.norm = nn.BatchNorm1d(width, eps=torch_parts.EPSILON)

  def forward(self, x: Tensor) -> Tensor:
    return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class Head(nn.Module):
  """A logit of each patch, from activations [b, n, d] of one depth."""

  def __init__(self, width: int, kernel: int):
    super().__init__()
    self.embed = Layer(width, 1)
    self.around = Layer(width, kernel)
    self.logit = SpectralConv(width, 1, 1)

  def forward(self, x: Tensor) -> Tensor:
    x = self.embed(x.transpose(1, 2))
    x = (x + self.around(x)) * math.sqrt(0.5)
    return self.logit(x)[:, 0].float()


class Heads(nn.Module):
  """The trained part of the critic: one head for each tap of its trunk."""

  def __init__(self, count: int, width: int, kernel: int):
    super().__init__()
    self.heads = nn.ModuleList([Head(width, kernel) for _ in range(count)])

  def forward(self, taps: list[Tensor]) -> Tensor:
    pairs = zip(self.heads, taps, strict=True)
    return torch.cat([head(tap) for head, tap in pairs], dim=1)
