"""Released state dicts of SiT and its descendants as parameters of `sit.SiT`.

Names are those of the SiT repository, which REPA, REG, the 1D SiT of SoftVQ and
LightningDiT extend. Which of them a file is of, its names do not always tell,
so it has to be said.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from selfboottok_jax import errors
from selfboottok_jax.models import layers, sit, transformer
from selfboottok_jax.pretrained import convert

Arrays = Mapping[str, Any]
# A name and a shape to the array.
Take = convert.Take


@dataclasses.dataclass(frozen=True)
class Family:
  """Files of one code base.

  Attributes:
    data_at_one: their time is 0 at the noise and 1 at the data; ours, and that
      of all others, is 0 at the data.
    unused: names in the files, as patterns, of what is computed here.
  """

  data_at_one: bool = False
  unused: tuple[str, ...] = ()


FAMILIES = {
  'sit': Family(data_at_one=True),
  'repa': Family(),
  'reg': Family(),
  'softvq': Family(),
  'lightningdit': Family(data_at_one=True, unused=('feat_rope.*',)),
}

_TIME_FEATURES = 256
# Tables of positions are fixed, but may have been kept in 16 bits.
_POSITIONS_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a file holds what our module has in one form only.

  Attributes:
    embed: name of the embedding: a Linear, or a convolution '....proj'.
    patch_size: of the convolution.
    learn_sigma: whether the last layer predicts a variance too, which nobody
      uses: twice the channels, the velocity first.
    data_at_one: see `Family`.
  """

  embed: str
  patch_size: int
  learn_sigma: bool
  data_at_one: bool


def read(
  arrays: Mapping[str, np.ndarray],
  model: sit.SiT,
  family: str,
  source: str,
) -> dict[str, PyTree]:
  """Parameters of `model` from a state dict.

  Args:
    arrays: by the names of the file.
    model: as `released_generators.fields` describes it.
    family: one of FAMILIES.
    source: names the file in errors.

  Returns:
    Parameters by module, float32 on the host.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite; or positions that are not the fixed ones.
  """
  positions = _positions(model)
  wanted = {'pos_embed': (1, *positions.shape)}

  def take(name, *shape):
    wanted[name] = shape
    array = arrays.get(name)
    if array is None or array.shape != shape:
      # `convert.check` will list it with all others.
      return np.zeros(shape, np.float32)
    return np.asarray(array, np.float32)

  params = assemble(take, model, layout_of(arrays, model, family))
  convert.check(
    arrays,
    wanted,
    f'{family} of width {model.width}',
    source,
    unused=FAMILIES[family].unused,
  )
  _check_positions(arrays['pos_embed'], positions, source)
  return jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float32), jax.device_get(params)
  )


def layout_of(arrays: Arrays, model: sit.SiT, family: str) -> Layout:
  """The layout of a state dict for `model`."""
  kernel = arrays.get('x_embedder.proj.weight')
  rows = np.shape(arrays.get('final_layer.linear.bias'))
  return Layout(
    embed='x_embedder' if 'x_embedder.weight' in arrays else 'x_embedder.proj',
    patch_size=1 if np.ndim(kernel) != 4 else kernel.shape[-1],
    learn_sigma=rows == (2 * model.token_dim,),
    data_at_one=FAMILIES[family].data_at_one,
  )


def assemble(take: Take, model: sit.SiT, layout: Layout) -> dict[str, PyTree]:
  """Parameters from arrays: copies, transpositions and sums, thus linear.

  Traceable, so that a gradient goes back to the names of the file.
  """
  width = model.width
  first = convert.linear(take, 't_embedder.mlp.0', _TIME_FEATURES, width)
  if layout.data_at_one:
    first['kernel'] = reverse_time(first['kernel'])
  params = {
    'token_embed': _embedding(take, model, layout),
    'time0': first,
    'time1': convert.linear(take, 't_embedder.mlp.2', width, width),
    'label_table': {
      'embedding': take(
        'y_embedder.embedding_table.weight', model.num_classes + 1, width
      )
    },
    'modulation': convert.linear(
      take, 'final_layer.adaLN_modulation.1', width, 2 * width
    ),
    'to_velocity': _velocity(take, model, layout),
  }
  if model.norm == 'rms':
    params['norm'] = _scale(take, 'final_layer.norm_final', width)
  if model.cls_dim:
    params |= {
      'cls_embed': convert.linear(
        take, 'cls_projectors2', model.cls_dim, width
      ),
      'cls_norm': convert.norm(take, 'wg_norm', width),
      'to_cls_velocity': convert.linear(
        take, 'final_layer.linear_cls', width, model.cls_dim
      ),
    }
  if model.align_dim:
    params['projector'] = _projector(take, model)
  return params | _blocks(take, model)


def reverse_time(kernel: Any) -> Any:
  """Of the first Linear of the time: makes it read t where it read 1 - t.

  Its features are cos(w t) and sin(w t), and those of 1 - t are rotations of
  these by w, so that the Linear takes them in; its own inverse. In float64, as
  far as `kernel` is not traced.
  """
  half = kernel.shape[0] // 2
  w = np.exp(-np.log(1e4) * np.arange(half) / half)[:, None]
  of_cos, of_sin = kernel[:half], kernel[half:]
  return jnp.concatenate(
    [
      np.cos(w) * of_cos + np.sin(w) * of_sin,
      np.sin(w) * of_cos - np.cos(w) * of_sin,
    ]
  )


def _embedding(take, model, layout):
  width, p = model.width, layout.patch_size
  if layout.embed == 'x_embedder':
    return convert.linear(take, layout.embed, model.token_dim, width)
  channels = model.token_dim // p**2
  kernel = take(f'{layout.embed}.weight', width, channels, p, p)
  return {
    'kernel': kernel.transpose(2, 3, 1, 0).reshape(-1, width),
    'bias': take(f'{layout.embed}.bias', width),
  }


def _velocity(take, model, layout):
  """The last layer, from noise to data the other way round."""
  outputs, halves = model.token_dim, 1 + layout.learn_sigma
  layer = convert.linear(
    take, 'final_layer.linear', model.width, halves * outputs
  )
  sign = -1 if layout.data_at_one else 1

  def velocity(leaf):
    # Channels are innermost in a patch, whichever they are.
    leaf = leaf.reshape(*leaf.shape[:-1], layout.patch_size**2, halves, -1)
    return sign * leaf[..., 0, :].reshape(*leaf.shape[:-3], outputs)

  return jax.tree.map(velocity, layer)


def _projector(take, model):
  """REPA's; REG has the same one for the class token."""
  width, hidden = model.width, model.projector_width
  return {
    'layer0': convert.linear(take, 'projectors.0.0', width, hidden),
    'layer1': convert.linear(take, 'projectors.0.2', hidden, hidden),
    'layer2': convert.linear(take, 'projectors.0.4', hidden, model.align_dim),
  }


def _blocks(take, model):
  params = {}
  for begin, end in model.segments:
    blocks = [_block(take, f'blocks.{i}', model) for i in range(begin, end)]
    params[transformer.segment_name(begin)] = {
      'block': jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    }
  return params


def _block(take, name, model):
  width, rms = model.width, model.norm == 'rms'
  attention = {
    'qkv': convert.linear(take, f'{name}.attn.qkv', width, 3 * width),
    'out': convert.linear(take, f'{name}.attn.proj', width, width),
  }
  if model.qk_norm:
    norm, of_head = _scale if rms else convert.norm, width // model.heads
    attention['query_norm'] = norm(take, f'{name}.attn.q_norm', of_head)
    attention['key_norm'] = norm(take, f'{name}.attn.k_norm', of_head)
  parts = 6 if model.shift else 4
  block = {
    'attn': attention,
    'mlp': _mlp(take, f'{name}.mlp', model),
    'modulation': convert.linear(
      take, f'{name}.adaLN_modulation.1', width, parts * width
    ),
  }
  if rms:
    block['norm1'] = _scale(take, f'{name}.norm1', width)
    block['norm2'] = _scale(take, f'{name}.norm2', width)
  return block


def _mlp(take, name, model):
  width = model.width
  if model.mlp == 'swiglu':
    hidden = int(2 / 3 * int(width * model.mlp_ratio))
    up, down, doubled = 'w12', 'w3', 2
  else:
    hidden = round(width * model.mlp_ratio)
    up, down, doubled = 'fc1', 'fc2', 1
  return {
    'up': convert.linear(take, f'{name}.{up}', width, doubled * hidden),
    'down': convert.linear(take, f'{name}.{down}', hidden, width),
  }


def _scale(take, name, width):
  return {'scale': take(f'{name}.weight', width)}


def _positions(model):
  """The fixed positions, with the class token's where there is one."""
  if model.positions == '1d':
    table = layers.sincos_1d(model.num_tokens, model.width)
  else:
    table = layers.sincos_2d(round(model.num_tokens**0.5), model.width)
  return np.pad(table, ((int(model.cls_dim > 0), 0), (0, 0)))


def _check_positions(table, positions, source) -> None:
  """WeightsError for positions that are not the ones computed here."""
  gap = np.abs(np.asarray(table[0], np.float32) - positions).max()
  if gap > _POSITIONS_TOLERANCE:
    raise errors.WeightsError(
      f'{source} does not fit: its pos_embed is up to {gap:.2g} away from the '
      'fixed sines and cosines; give a file of a network that has these'
    )
