"""One vision transformer for DINOv2, DINO, I-JEPA, SigLIP2, MAE and CLIP.

The second half reads published state dicts. Names are those of the files:
Hugging Face's Dinov2Model (with and without registers), IJepaModel and
SiglipVisionModel, and timm's, in which the official DINO and DINOv2 releases
are kept too, and MAE and CLIP.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax.models import layers, transformer
from selfboottok_jax.pretrained import resample, weight_reader


@flax.struct.dataclass
class VitOutput:
  """Output of a transformer for a batch of images.

  Attributes:
    patches: after the final norm, in raster order.
    summary: the class token after the final norm, or the pooled token of an
      attention head; None where there is neither.
    hidden: number of blocks passed to all tokens after them: class token,
      registers, patches.
  """

  patches: Float[Array, 'b n d']
  summary: Float[Array, 'b d'] | None
  hidden: dict[int, Float[Array, 'b m d']]


class Vit(nn.Module):
  """A pre-norm vision transformer on images of one size.

  Attributes:
    grid: rows and columns of patches; the position table is of this grid.
    patch_size: p.
    width: d.
    depth: number of blocks.
    heads: attention heads, a divisor of `width`.
    hidden: width of the MLPs.
    cls: True if a class token with a position of its own goes first.
    registers: tokens without a position, behind the class token.
    layer_scale: True if residual branches have gains.
    gelu: a key of `layers.GELUS`.
    pre_norm: True if tokens are normalised before the first block too.
    pool: True if an attention head with a learned probe makes the summary.
    taps: numbers of blocks after which all tokens are handed out.
    attention: implementation, see `layers.Attention`.
    dtype: of the computation; outputs are float32.
  """

  grid: tuple[int, int]
  patch_size: int
  width: int
  depth: int
  heads: int
  hidden: int
  cls: bool = True
  registers: int = 0
  layer_scale: bool = False
  gelu: str = 'exact'
  pre_norm: bool = False
  pool: bool = False
  taps: tuple[int, ...] = ()
  attention: str = 'auto'
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, images: Float[Array, 'b h w 3']) -> VitOutput:
    """Takes images as the network was trained on them, normalised."""
    x = layers.patchify(images.astype(self.dtype), self.patch_size)
    x = layers.dense(self.width, self.dtype, name='patch_embed')(x)
    count = self.grid[0] * self.grid[1]
    if x.shape[1] != count:
      raise ValueError(
        f'{x.shape[1]} patches of images {images.shape[1:3]}; wanted a grid of '
        f'{self.grid[0]} x {self.grid[1]}'
      )
    x = x + self._tokens('positions', count)
    first = [self._tokens('cls', 1)] if self.cls else []
    if self.registers:
      first.append(self._tokens('registers', self.registers))
    first = [jnp.broadcast_to(t, (len(x), *t.shape[1:])) for t in first]
    x = jnp.concatenate([*first, x], axis=1)
    if self.pre_norm:
      x = layers.layer_norm(self.dtype, name='norm_pre')(x)
    x, hidden = self._blocks(x)
    x = layers.layer_norm(self.dtype, name='norm')(x).astype(jnp.float32)
    summary = x[:, 0] if self.cls else None
    patches = x[:, -count:]
    if self.pool:
      summary = self._pool(patches)
    return VitOutput(patches, summary, hidden)

  def _tokens(self, name: str, count: int) -> Float[Array, '1 n d']:
    """Learnt tokens, the same for every image."""
    shape = (1, count, self.width)
    normal = nn.initializers.normal(0.02)
    # Outside of a trace the parameters may be numpy arrays.
    return jnp.asarray(self.param(name, normal, shape), self.dtype)

  def _blocks(
    self, x: Float[Array, 'b m d']
  ) -> tuple[Float[Array, 'b m d'], dict[int, Float[Array, 'b m d']]]:
    """Applies all blocks.

    Returns:
      The last tokens, and the tokens after each of `taps` by block number.
    """
    # A scan hands out only its end, so there is one up to each tap.
    block = functools.partial(
      transformer.Block,
      self.heads,
      self.hidden / self.width,
      float(self.layer_scale),
      self.attention,
      self.dtype,
      self.gelu,
    )
    hidden = {0: x.astype(jnp.float32)} if 0 in self.taps else {}
    for begin, end in transformer.segments(self.depth, self.taps):
      name = transformer.segment_name(begin)
      stack = transformer.Stack(block, end - begin, dtype=self.dtype, name=name)
      x = stack(x)
      if end in self.taps:
        hidden[end] = x.astype(jnp.float32)
    return x, hidden

  def _pool(self, patches: Float[Array, 'b n d']) -> Float[Array, 'b d']:
    """A learned probe attends to the patches; then a residual MLP."""
    b = patches.shape[0]
    probe = jnp.broadcast_to(self._tokens('probe', 1), (b, 1, self.width))
    attend = layers.Attention(
      self.heads,
      implementation=self.attention,
      dtype=self.dtype,
      name='pool_attn',
    )
    pooled = attend(probe, patches.astype(self.dtype))
    h = layers.layer_norm(self.dtype, name='pool_norm')(pooled)
    ratio = self.hidden / self.width
    mlp = layers.Mlp(ratio, self.gelu, self.dtype, name='pool_mlp')
    return (pooled + mlp(h))[:, 0].astype(jnp.float32)


_EPSILON = layers.LAYER_NORM_EPSILON


@dataclasses.dataclass(frozen=True)
class ArrayNames:
  """Names of the arrays in a family of files, and what they hold.

  Attributes:
    family: of the files, for errors.
    block: prefix of a block's arrays, with {} for its number.
    inside: our name of a part of a block to theirs. q, k and v are either
      three, or one 'qkv'.
    outside: our name of everything else to theirs; a missing one is absent.
    unused: names, as patterns, that may be in the file and serve training
      alone.
    flat_positions: True if the position table has no batch axis.
    antialias: True if the table is resized with antialiasing.
    epsilon: of the norms. Where it is not ours, all that blocks add up is
      scaled on import: the norm of s x with an epsilon of s^2 e is that of x
      with e.
  """

  family: str
  block: str
  inside: Mapping[str, str]
  outside: Mapping[str, str]
  unused: Sequence[str] = ()
  flat_positions: bool = False
  antialias: bool = False
  epsilon: float = _EPSILON

  @property
  def stream_scale(self) -> float:
    """Returns s, see `epsilon`."""
    return math.sqrt(_EPSILON / self.epsilon)


_HF_ATTENTION = {
  'q': 'attention.attention.query',
  'k': 'attention.attention.key',
  'v': 'attention.attention.value',
  'out': 'attention.output.dense',
}
_HF_EMBEDDINGS = {
  'patch_embed': 'embeddings.patch_embeddings.projection',
  'positions': 'embeddings.position_embeddings',
  'cls': 'embeddings.cls_token',
  'registers': 'embeddings.register_tokens',
  'norm': 'layernorm',
}
_DINOV2 = ArrayNames(
  'dinov2',
  'encoder.layer.{}.',
  {
    **_HF_ATTENTION,
    'norm1': 'norm1',
    'norm2': 'norm2',
    'up': 'mlp.fc1',
    'down': 'mlp.fc2',
    'scale1': 'layer_scale1.lambda1',
    'scale2': 'layer_scale2.lambda1',
  },
  _HF_EMBEDDINGS,
  unused=('embeddings.mask_token',),
)
NAMINGS = {
  'dinov2': _DINOV2,
  'dinov2_registers': dataclasses.replace(
    _DINOV2, family='dinov2_registers', antialias=True
  ),
  'ijepa': ArrayNames(
    'ijepa',
    'encoder.layer.{}.',
    {
      **_HF_ATTENTION,
      'norm1': 'layernorm_before',
      'norm2': 'layernorm_after',
      'up': 'intermediate.dense',
      'down': 'output.dense',
    },
    _HF_EMBEDDINGS,
  ),
  'siglip': ArrayNames(
    'siglip',
    'vision_model.encoder.layers.{}.',
    {
      'q': 'self_attn.q_proj',
      'k': 'self_attn.k_proj',
      'v': 'self_attn.v_proj',
      'out': 'self_attn.out_proj',
      'norm1': 'layer_norm1',
      'norm2': 'layer_norm2',
      'up': 'mlp.fc1',
      'down': 'mlp.fc2',
    },
    {
      'patch_embed': 'vision_model.embeddings.patch_embedding',
      'positions': 'vision_model.embeddings.position_embedding.weight',
      'norm': 'vision_model.post_layernorm',
      'pool': 'vision_model.head.',
    },
    flat_positions=True,
  ),
  'timm': ArrayNames(
    'timm',
    'blocks.{}.',
    {
      'qkv': 'attn.qkv',
      'out': 'attn.proj',
      'norm1': 'norm1',
      'norm2': 'norm2',
      'up': 'mlp.fc1',
      'down': 'mlp.fc2',
      'scale1': 'ls1.gamma',
      'scale2': 'ls2.gamma',
    },
    {
      'patch_embed': 'patch_embed.proj',
      'positions': 'pos_embed',
      'cls': 'cls_token',
      'registers': 'register_tokens',
      'norm': 'norm',
    },
    unused=('mask_token',),
    antialias=True,
  ),
}
NAMINGS['clip'] = dataclasses.replace(
  NAMINGS['timm'],
  family='clip',
  outside={**NAMINGS['timm'].outside, 'norm_pre': 'norm_pre'},
  # The projection to the space of texts.
  unused=('head.*',),
  epsilon=1e-5,
)


def is_timm(arrays: weight_reader.Arrays) -> bool:
  """True if a state dict has the names of timm and of Meta's releases."""
  return 'patch_embed.proj.weight' in arrays


def read(
  arrays: weight_reader.Arrays,
  network: Vit,
  names: ArrayNames,
  source: str,
  *,
  grid: tuple[int, int] | None = None,
  patch_size: int | None = None,
) -> PyTree:
  """Parameters of `network` from a state dict.

  Args:
    arrays: by the names of the file.
    network: what the parameters are for; its grid and patch size may differ
      from those of the file, and are reached by resampling.
    names: names of the arrays, one of NAMINGS or a variation of it.
    source: names the file in errors.
    grid: rows and columns of the file's position table; None for the network's.
    patch_size: of the file; None for the network's.

  Returns:
    {'params': ...} without its outer key, float32.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite.
  """
  reader = weight_reader.Reader(arrays)
  params = _outside(reader, network, names, grid or network.grid, patch_size)
  for begin, end in transformer.segments(network.depth, network.taps):
    blocks = [_block(reader, network, names, i) for i in range(begin, end)]
    params[transformer.segment_name(begin)] = {
      'block': weight_reader.stack(blocks)
    }
  reader.check(f'{names.family} vision transformer', source, names.unused)
  return params


def _outside(
  reader: weight_reader.Reader,
  network: Vit,
  names: ArrayNames,
  grid: tuple[int, int],
  patch_size: int | None,
) -> dict[str, Any]:
  """Parameters of everything but the blocks."""
  width, p = network.width, patch_size or network.patch_size
  outside = names.outside
  if network.pre_norm:
    # A bias before a norm of all tokens: CLIP has none.
    weight = reader.take(f'{outside["patch_embed"]}.weight', width, 3, p, p)
    embed = {
      'kernel': weight.transpose(2, 3, 1, 0),
      'bias': np.zeros(width, np.float32),
    }
  else:
    embed = reader.conv(outside['patch_embed'], 3, width, p, p)
  kernel = resample.resize_patch_kernel(embed['kernel'], network.patch_size)
  params: dict[str, Any] = {
    'patch_embed': {**embed, 'kernel': kernel.reshape(-1, width)},
    'norm': reader.norm(outside['norm'], width),
  }
  if network.pre_norm:
    params['norm_pre'] = reader.norm(outside['norm_pre'], width)
  count = grid[0] * grid[1] + network.cls
  batch = () if names.flat_positions else (1,)
  table = reader.take(outside['positions'], *batch, count, width)
  table = table.reshape(count, width)
  if network.cls:
    # Its position is added here, once, instead of in every step.
    cls = reader.take(outside['cls'], 1, 1, width)
    params['cls'] = cls + table[None, :1]
    table = table[1:]
  params['positions'] = resample.resize_positions(
    table, grid, network.grid, antialias=names.antialias
  )[None]
  if network.registers:
    params['registers'] = reader.take(
      outside['registers'], 1, network.registers, width
    )
  scale = names.stream_scale
  if scale != 1:
    tokens = ('patch_embed', 'positions', 'cls', 'registers')
    params |= {
      name: jax.tree.map(lambda x: np.float32(scale) * x, params[name])
      for name in (*tokens, 'norm_pre')
      if name in params
    }
  if network.pool:
    params |= _pool(reader, network, outside['pool'])
  return params


def _pool(
  reader: weight_reader.Reader, network: Vit, prefix: str
) -> dict[str, Any]:
  """Parameters of SigLIP's attention head."""
  width, hidden = network.width, network.hidden
  # The file has one matrix for q, k and v; our query comes from a learned
  # probe, so q has a layer of its own.
  joint = reader.take(f'{prefix}attention.in_proj_weight', 3 * width, width).T
  bias = reader.take(f'{prefix}attention.in_proj_bias', 3 * width)
  return {
    'probe': reader.take(f'{prefix}probe', 1, 1, width),
    'pool_attn': {
      'query': {'kernel': joint[:, :width], 'bias': bias[:width]},
      'key_value': {'kernel': joint[:, width:], 'bias': bias[width:]},
      'out': reader.linear(f'{prefix}attention.out_proj', width, width),
    },
    'pool_norm': reader.norm(f'{prefix}layernorm', width),
    'pool_mlp': {
      'up': reader.linear(f'{prefix}mlp.fc1', width, hidden),
      'down': reader.linear(f'{prefix}mlp.fc2', hidden, width),
    },
  }


def _block(
  reader: weight_reader.Reader, network: Vit, names: ArrayNames, index: int
) -> dict[str, Any]:
  """Parameters of one block."""
  width, hidden = network.width, network.hidden
  inside = {
    ours: names.block.format(index) + theirs
    for ours, theirs in names.inside.items()
  }
  if 'qkv' in inside:
    qkv = reader.linear(inside['qkv'], width, 3 * width)
  else:
    parts = [reader.linear(inside[part], width, width) for part in 'qkv']
    qkv = {
      key: np.concatenate([part[key] for part in parts], axis=-1)
      for key in ('kernel', 'bias')
    }

  def back(part: str, inputs: int) -> dict[str, Any]:
    """What a block adds to the tokens."""
    layer = reader.linear(inside[part], inputs, width)
    scale = np.float32(names.stream_scale)
    return {name: scale * array for name, array in layer.items()}

  block = {
    'attn': {'qkv': qkv, 'out': back('out', width)},
    'mlp': {
      'up': reader.linear(inside['up'], width, hidden),
      'down': back('down', hidden),
    },
    'norm1': reader.norm(inside['norm1'], width),
    'norm2': reader.norm(inside['norm2'], width),
  }
  if network.layer_scale:
    for gain in ('scale1', 'scale2'):
      block[gain] = reader.take(inside[gain], width)
  return block
