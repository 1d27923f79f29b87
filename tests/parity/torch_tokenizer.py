"""The tokenizer of stage 1 in torch, written for the comparison alone."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import torch_parts

# Token groups behind the global one.
LOCALS = ('local1d', 'local2d')


class SoftVq(nn.Module):
  """Tokens [b, k, e] as mixtures of rows, by cosine, always in float32."""

  def __init__(self, rows: int, codebooks: int, width: int, tau: float):
    super().__init__()
    self.tau = tau
    self.codebook = nn.Parameter(torch.randn(codebooks, rows, width))

  def forward(self, z: Tensor) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):
      rows = F.normalize(self.codebook, dim=-1)
      parts = z.float().view(len(z), len(rows), -1, z.shape[-1])
      parts = F.normalize(parts, dim=-1)
      # Rows learn as values alone, not as keys.
      logits = torch.einsum('bnse,nve->bnsv', parts, rows.detach()) / self.tau
      codes = torch.einsum('bnsv,nve->bnse', logits.softmax(dim=-1), rows)
      return codes.reshape(z.shape)


class Encoder(nn.Module):
  """Tokens of images, read at queries behind [class token, patches]."""

  def __init__(
    self,
    grid: int,
    patch_size: int,
    num_tokens: int,
    token_dim: int,
    width: int,
    depth: int,
    heads: int,
    gain: float,
  ):
    super().__init__()
    self.patch_size, self.num_tokens = patch_size, num_tokens
    self.patch_embed = nn.Linear(3 * patch_size**2, width)
    self.patch_positions = torch_parts.normal(1, grid**2, width)
    self.cls = torch_parts.normal(1, 1, width)
    self.latent_queries = torch_parts.normal(1, num_tokens, width)
    self.blocks = nn.ModuleList(
      [torch_parts.Block(width, heads, gain=gain) for _ in range(depth)]
    )
    self.norm = nn.LayerNorm(width, eps=torch_parts.EPSILON)
    self.to_code = nn.Linear(width, token_dim)

  def forward(self, images: Tensor) -> Tensor:
    x = self.patch_embed(torch_parts.patchify(images, self.patch_size))
    x = x + self.patch_positions
    first = self.cls.expand(len(x), -1, -1)
    last = self.latent_queries.expand(len(x), -1, -1)
    x = torch.cat([first, x, last], dim=1)
    for block in self.blocks:
      x = block(x)
    return self.to_code(self.norm(x[:, -self.num_tokens :]))


class Local2D(nn.Module):
  """Local tokens, read at queries that see all tokens and earlier queries."""

  def __init__(
    self, num_tokens: int, token_dim: int, width: int, depth: int, heads: int
  ):
    super().__init__()
    k = num_tokens
    self.embed = nn.Linear(token_dim, width)
    self.prefix_positions = torch_parts.normal(1, k, width)
    self.queries = torch_parts.normal(1, k, width)
    self.query_positions = torch_parts.normal(1, k, width)
    self.blocks = nn.ModuleList(
      [torch_parts.Block(width, heads) for _ in range(depth)]
    )
    self.norm = nn.LayerNorm(width, eps=torch_parts.EPSILON)
    self.to_code = nn.Linear(width, token_dim)
    mask = torch.ones(2 * k, 2 * k, dtype=torch.bool).tril()
    mask[:, :k] = True
    self.register_buffer('mask', mask, persistent=False)

  def forward(self, z: Tensor) -> Tensor:
    k = z.shape[1]
    x = self.embed(z) + self.prefix_positions
    queries = (self.queries + self.query_positions).expand(len(z), -1, -1)
    x = torch.cat([x, queries], dim=1)
    for block in self.blocks:
      x = block(x, self.mask)
    return self.to_code(self.norm(x[:, k:]))


class DecoderBlock(nn.Module):
  """Gated cross-attention to each of two contexts, then a plain block."""

  def __init__(self, width: int, heads: int, gain: float):
    super().__init__()
    for index in range(len(LOCALS)):
      attention = torch_parts.Attention(width, heads, crosses=True)
      norm = nn.LayerNorm(width, eps=torch_parts.EPSILON)
      self.add_module(f'cross{index}', attention)
      self.add_module(f'cross_norm{index}', norm)
      self.register_parameter(f'gate{index}', nn.Parameter(torch.zeros(())))
    self.vit = torch_parts.Block(width, heads, gain=gain)

  def forward(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = x + self.gate0 * self.cross0(self.cross_norm0(x), first)
    x = x + self.gate1 * self.cross1(self.cross_norm1(x), second)
    return self.vit(x)


class Decoder(nn.Module):
  """Pixels, read at mask tokens behind a class token and before the codes."""

  def __init__(
    self,
    grid: int,
    patch_size: int,
    num_tokens: int,
    token_dim: int,
    width: int,
    depth: int,
    heads: int,
    gain: float,
  ):
    super().__init__()
    self.grid, self.patch_size = grid, patch_size
    self.mask_token = torch_parts.normal(1, 1, width)
    self.patch_positions = torch_parts.normal(1, grid**2, width)
    self.cls = torch_parts.normal(1, 1, width)
    self.token_positions = torch_parts.normal(1, num_tokens, width)
    self.from_code = nn.Linear(token_dim, width)
    self.context0 = nn.Linear(token_dim, width)
    self.context1 = nn.Linear(token_dim, width)
    self.blocks = nn.ModuleList(
      [DecoderBlock(width, heads, gain) for _ in range(depth)]
    )
    self.norm = nn.LayerNorm(width, eps=torch_parts.EPSILON)
    self.to_pixels = nn.Linear(width, 3 * patch_size**2)

  def forward(self, fused: Tensor, first: Tensor, second: Tensor) -> Tensor:
    patches = self.mask_token + self.patch_positions
    start = torch.cat([self.cls, patches], dim=1).expand(len(fused), -1, -1)
    tokens = self.from_code(fused) + self.token_positions
    x = torch.cat([start, tokens], dim=1)
    first, second = self.context0(first), self.context1(second)
    for block in self.blocks:
      x = block(x, first, second)
    x = self.norm(x[:, 1 : 1 + self.grid**2])
    return torch_parts.unpatchify(self.to_pixels(x), self.patch_size)


class Fusion(nn.Module):
  """A sum of the three groups, with weights that add up to 1."""

  def __init__(self) -> None:
    super().__init__()
    self.weights = nn.Parameter(torch.tensor([1.0, 0.0]))

  def forward(self, tokens: Tensor, first: Tensor, second: Tensor) -> Tensor:
    a, b = self.weights
    return a * tokens + b * first + (1 - a - b) * second


class Output(NamedTuple):
  """Images [b, 3, h, w], and tokens [b, k, e] before they are quantised."""

  reconstruction: Tensor
  tokens: Tensor
  local1d: Tensor


class Tokenizer(nn.Module):
  """Images [b, 3, h, w] in [-1, 1] to tokens and back.

  Arguments are fields of our Tokenizer.
  """

  def __init__(
    self,
    *,
    image_size: int,
    patch_size: int,
    num_tokens: int,
    token_dim: int,
    encoder_width: int,
    encoder_depth: int,
    decoder_width: int,
    decoder_depth: int,
    head_dim: int,
    layer_scale: float,
    codebook_size: int,
    num_codebooks: int,
    tau: float,
    local1d_width: int,
    local2d_width: int,
    local2d_depth: int,
  ):
    super().__init__()
    sizes = image_size // patch_size, patch_size, num_tokens, token_dim
    width, depth = encoder_width, encoder_depth
    self.encoder = Encoder(*sizes, width, depth, width // head_dim, layer_scale)
    width, depth = decoder_width, decoder_depth
    self.decoder = Decoder(*sizes, width, depth, width // head_dim, layer_scale)
    self.fuse = Fusion()
    self.local1d = torch_parts.Projector(token_dim, token_dim, local1d_width)
    width, depth = local2d_width, local2d_depth
    self.local2d = Local2D(
      num_tokens, token_dim, width, depth, width // head_dim
    )
    for group in ('global', *LOCALS):
      quantizer = SoftVq(codebook_size, num_codebooks, token_dim, tau)
      self.add_module(f'quantizer_{group}', quantizer)

  def forward(self, images: Tensor) -> Output:
    tokens = self.encoder(images).float()
    # Of unit root mean square.
    tokens = tokens * torch.rsqrt(
      tokens.square().mean(dim=-1, keepdim=True) + 1e-6
    )
    local1d, local2d = self.local1d(tokens), self.local2d(tokens)
    codes = self.quantizer_global(tokens)
    first = self.quantizer_local1d(local1d)
    second = self.quantizer_local2d(local2d)
    fused = self.fuse(codes, first, second)
    return Output(self.decoder(fused, first, second), tokens, local1d)
