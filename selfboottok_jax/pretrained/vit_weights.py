"""Published state dicts of vision transformers as parameters of `vit.Vit`.

Names are those of the files: Hugging Face's Dinov2Model (with and without
registers), IJepaModel and SiglipVisionModel, and timm's, in which the official
DINO and DINOv2 releases are kept too.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import PyTree

from selfboottok_jax.models import transformer
from selfboottok_jax.pretrained import convert, resample, vit

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a family of files calls its arrays.

  Attributes:
    block: prefix of a block's arrays, with {} for its number.
    inside: our name of a part of a block to theirs. q, k and v are either
      three, or one 'qkv'.
    outside: our name of everything else to theirs; a missing one is absent.
    unused: names that may be in the file and serve training alone.
    flat_positions: the table has no batch axis.
    kind: how the table is resized, see `resample`.
    antialias: whether with antialiasing.
  """

  block: str
  inside: Mapping[str, str]
  outside: Mapping[str, str]
  unused: Sequence[str] = ()
  flat_positions: bool = False
  kind: str = 'bicubic'
  antialias: bool = False


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
_DINOV2 = Layout(
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
LAYOUTS = {
  'dinov2': _DINOV2,
  'dinov2_registers': dataclasses.replace(_DINOV2, antialias=True),
  'ijepa': Layout(
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
  'siglip': Layout(
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
  'timm': Layout(
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


# Trained on images of any shape.
LAYOUTS['siglip2_naflex'] = dataclasses.replace(
  LAYOUTS['siglip'], kind='bilinear', antialias=True
)


def is_timm(arrays: Arrays) -> bool:
  """Whether a state dict has the names of timm and of Meta's own releases."""
  return 'patch_embed.proj.weight' in arrays


class _Reader:
  """Takes arrays by name, and remembers which shapes it wanted."""

  def __init__(self, arrays: Arrays):
    self.arrays, self.wanted = arrays, {}

  def take(self, name: str, *shape: int) -> np.ndarray:
    self.wanted[name] = shape
    array = self.arrays.get(name)
    if array is None or array.shape != shape:
      # `convert.check` will list it with all others.
      return np.zeros(shape, np.float32)
    return np.asarray(array, np.float32)

  def linear(self, name: str, inputs: int, outputs: int):
    return {
      'kernel': self.take(f'{name}.weight', outputs, inputs).T,
      'bias': self.take(f'{name}.bias', outputs),
    }

  def norm(self, name: str, width: int):
    return {
      'scale': self.take(f'{name}.weight', width),
      'bias': self.take(f'{name}.bias', width),
    }


def read(
  arrays: Arrays,
  network: vit.Vit,
  layout: str,
  source: str,
  *,
  grid: tuple[int, int] | None = None,
  patch_size: int | None = None,
  antialias: bool | None = None,
) -> PyTree:
  """Parameters of `network` from a state dict.

  Args:
    arrays: by the names of the file.
    network: what the parameters are for; its grid and patch size may differ
      from those of the file, and are reached by resampling.
    layout: one of LAYOUTS.
    source: names the file in errors.
    grid: rows and columns of the file's position table; None for the network's.
    patch_size: of the file; None for the network's.
    antialias: whether positions are resized with antialiasing; None for the
      way of the layout's public class.

  Returns:
    {'params': ...} without its outer key, float32.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite.
  """
  names, reader = LAYOUTS[layout], _Reader(arrays)
  if antialias is not None:
    names = dataclasses.replace(names, antialias=antialias)
  params = _outside(reader, network, names, grid or network.grid, patch_size)
  for begin, end in transformer.segments(network.depth, network.taps):
    blocks = [_block(reader, network, names, i) for i in range(begin, end)]
    params[transformer.segment_name(begin)] = {'block': _stack(blocks)}
  convert.check(
    arrays, reader.wanted, f'{layout} vision transformer', source,
    unused=names.unused,
  )  # fmt: skip
  return params


def _outside(reader, network, names, grid, patch_size):
  width, p = network.width, patch_size or network.patch_size
  outside = names.outside
  kernel = reader.take(f'{outside["patch_embed"]}.weight', width, 3, p, p)
  kernel = resample.resize_patch_kernel(
    kernel.transpose(2, 3, 1, 0), network.patch_size
  )
  params = {
    'patch_embed': {
      'kernel': kernel.reshape(-1, width),
      'bias': reader.take(f'{outside["patch_embed"]}.bias', width),
    },
    'norm': reader.norm(outside['norm'], width),
  }
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
    table, grid, network.grid, names.kind, antialias=names.antialias
  )[None]
  if network.registers:
    params['registers'] = reader.take(
      outside['registers'], 1, network.registers, width
    )
  if network.pool:
    params |= _pool(reader, network, outside['pool'])
  return params


def _pool(reader, network, prefix):
  width, hidden = network.width, network.hidden
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


def _block(reader, network, names, index):
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
  block = {
    'attn': {'qkv': qkv, 'out': reader.linear(inside['out'], width, width)},
    'mlp': {
      'up': reader.linear(inside['up'], width, hidden),
      'down': reader.linear(inside['down'], hidden, width),
    },
    'norm1': reader.norm(inside['norm1'], width),
    'norm2': reader.norm(inside['norm2'], width),
  }
  if network.layer_scale:
    for gain in ('scale1', 'scale2'):
      block[gain] = reader.take(inside[gain], width)
  return block


def _stack(blocks: list[PyTree]) -> PyTree:
  """Trees of one structure to one tree with a new first axis."""
  first = blocks[0]
  if isinstance(first, dict):
    return {k: _stack([block[k] for block in blocks]) for k in first}
  return np.stack(blocks)
