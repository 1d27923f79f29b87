"""Published state dicts of autoencoders as parameters of `vae.Autoencoder`.

Names are those of latent diffusion's code (VA-VAE) and of diffusers'
AutoencoderKL (SD-VAE), its early hub files included.
"""

import re
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from selfboottok_jax.pretrained import convert, vae

Arrays = Mapping[str, np.ndarray]

# Our part of a module to latent diffusion's.
_PARTS = {
  'norm1': 'norm1',
  'conv1': 'conv1',
  'norm2': 'norm2',
  'conv2': 'conv2',
  'shortcut': 'nin_shortcut',
  'norm': 'norm',
  'q': 'q',
  'k': 'k',
  'v': 'v',
  'out': 'proj_out',
}
_MODULES = {
  'quant': 'quant_conv',
  'post_quant': 'post_quant_conv',
  'norm': 'norm_out',
  'mid_block0': 'mid.block_1',
  'mid_block1': 'mid.block_2',
  'mid_attn': 'mid.attn_1',
}
_LEVEL = re.compile(r'level(\d+)_(block|attn|down|up)(\d*)')
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}

# diffusers' names to latent diffusion's, applied in this order.
_DIFFUSERS = (
  (r'\.attentions\.0\.group_norm\.', '.attentions.0.norm.'),
  (r'\.(?:to_q|query)\.', '.q.'),
  (r'\.(?:to_k|key)\.', '.k.'),
  (r'\.(?:to_v|value)\.', '.v.'),
  (r'\.(?:to_out\.0|proj_attn)\.', '.proj_out.'),
  (r'\.conv_shortcut\.', '.nin_shortcut.'),
  (r'\.conv_norm_out\.', '.norm_out.'),
  (r'\.mid_block\.resnets\.0\.', '.mid.block_1.'),
  (r'\.mid_block\.resnets\.1\.', '.mid.block_2.'),
  (r'\.mid_block\.attentions\.0\.', '.mid.attn_1.'),
  (r'\.down_blocks\.(\d+)\.resnets\.(\d+)\.', r'.down.\1.block.\2.'),
  (r'\.down_blocks\.(\d+)\.downsamplers\.0\.', r'.down.\1.downsample.'),
)
_UP = re.compile(r'\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.')


def read(
  arrays: Arrays,
  network: vae.Autoencoder,
  source: str,
  unused: Collection[str] = (),
) -> PyTree:
  """Parameters of `network` from a state dict of either layout.

  `unused`: names that may be there and are left, as patterns.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite, in latent diffusion's names.
  """
  found = {
    _to_latent_diffusion(name, len(network.channels)): array
    for name, array in arrays.items()
  }
  size = network.stride
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, size, size, 3))
  )['params']
  wanted, params = {}, {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
    keys = [entry.key for entry in path]
    name = _name(keys)
    array = found.get(name)
    wanted[name] = _shape(leaf.shape, None if array is None else array.ndim)
    node = params
    for key in keys[:-1]:
      node = node.setdefault(key, {})
    if array is None or array.shape != wanted[name]:
      # `convert.check` will list it with all others.
      node[keys[-1]] = np.zeros(leaf.shape, np.float32)
    else:
      node[keys[-1]] = _ours(array, leaf.shape)
  convert.check(found, wanted, 'autoencoder', source, unused)
  return params


def _to_latent_diffusion(name: str, levels: int) -> str:
  for pattern, replacement in _DIFFUSERS:
    name = re.sub(pattern, replacement, name)

  def up(match):
    # There the coarsest level comes first.
    level = levels - 1 - int(match[1])
    if match[2] == 'resnets':
      return f'.up.{level}.block.{match[3]}.'
    return f'.up.{level}.upsample.'

  return _UP.sub(up, name)


def _name(keys: list[str]) -> str:
  """The file's name of the leaf at a path of ours."""
  *modules, leaf = keys
  parts = []
  for index, module in enumerate(modules):
    if match := _LEVEL.fullmatch(module):
      level, kind, number = match.groups()
      side = 'down' if modules[0] == 'encoder' else 'up'
      if kind in ('down', 'up'):
        parts.append(f'{side}.{level}.{side}sample.conv')
      else:
        parts.append(f'{side}.{level}.{kind}.{number}')
    elif index == 2:
      parts.append(_PARTS[module])
    else:
      parts.append(_MODULES.get(module, module))
  return '.'.join([*parts, _LEAVES[leaf]])


def _shape(ours: tuple[int, ...], ndim: int | None) -> tuple[int, ...]:
  """Of the file's array; attention is made of 1x1 convolutions or matrices."""
  if len(ours) == 4:
    return ours[3], ours[2], *ours[:2]
  if len(ours) == 2:
    return (*ours[::-1], 1, 1) if ndim == 4 else ours[::-1]
  return ours


def _ours(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  array = np.asarray(array, np.float32)
  if len(shape) == 4:
    return array.transpose(2, 3, 1, 0)
  return array.reshape(array.shape[:2]).T if len(shape) == 2 else array
