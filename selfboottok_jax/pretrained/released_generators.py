"""Released generators, SiT and its descendants, as a `sit.SiT`.

The table RELEASED has what is published. `fields` reads the sizes of a network
off its state dict, `read` its parameters. Names are those of the SiT
repository, which REPA, REG, the 1D SiT of SoftVQ and LightningDiT extend; a
state dict does not always reveal to which of these it belongs, so the family
has to be named.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors
from selfboottok_jax.models import layers, sit, transformer
from selfboottok_jax.pretrained import contract, weight_reader

Arrays = weight_reader.Arrays
Reader = weight_reader.Reader

# Attention heads by width, of S, B, L and XL.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


@dataclasses.dataclass(frozen=True)
class Generator:
  """A released generator whose state dicts can be imported.

  Attributes:
    family: one of `FAMILIES`.
    preset: of configs/generator.py, what it was trained and is sampled with.
    tokenizer: makes its codes; the name of an autoencoder, or '' for a SoftVQ
      that was imported, which has to be named.
    published: where its weights are.
    changes: values that the preset does not have, by dotted key.
    mean: of the codes, as its authors normalise them.
    std: their deviation.
  """

  family: str
  preset: str
  tokenizer: str
  published: contract.Published
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mean: float = 0.0
  std: float = 1.0


def _published(
  hub: str, file: str, licence: str, millions: float, url: str = ''
) -> contract.Published:
  return contract.Published(
    hub, (file,), licence, millions, 'released generator', url
  )


def _softvq(name: str, mean: float, std: float) -> Generator:
  return Generator(
    'softvq',
    'softvq_xl',
    '',
    _published(
      f'SoftVQVAE/sit-xl_softvq-{name}',
      'model.safetensors',
      'Apache-2.0',
      674.9,
    ),
    {
      'networks.teacher': '',
      'loss.cls': 0.0,
      'loss.align_mode': 'off',
      'loss.times': 'logit_normal',
      'sampling.guidance_scale': 1.75,
      'sampling.guidance_high': 0.7,
    },
    mean,
    std,
  )


# Latents of SD-VAE and VA-VAE come normalised from `autoencoders`, thus no mean
# and std.
RELEASED = {
  'sit_xl2': Generator(
    'sit',
    'sit_xl2',
    'sdvae',
    _published(
      '',
      'SiT-XL-2-256.pt',
      'MIT',
      674.8,
      'https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/'
      'SiT-XL-2-256.pt?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1',
    ),
  ),
  'repa_xl2': Generator(
    'repa',
    'reg_xl2',
    'sdvae',
    _published(
      '',
      'last.pt',
      'MIT',
      682.9,
      'https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/'
      'last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&dl=1',
    ),
    {
      'loss.cls': 0.0,
      'sampling.guidance_scale': 1.8,
      'sampling.guidance_high': 0.7,
    },
  ),
  # The page does not tell the file's name; this is the one in its authors'
  # scripts.
  'reg_xl2': Generator(
    'reg',
    'reg_xl2',
    'sdvae',
    _published(
      '', '4000000.pt', 'MIT', 684.7, 'https://huggingface.co/Martinser/REG'
    ),
  ),
  'lightningdit_xl1': Generator(
    'lightningdit',
    'lightningdit_xl1',
    'vavae',
    _published(
      'hustvl/lightningdit-xl-imagenet256-800ep',
      'lightningdit-xl-imagenet256-800ep.pt',
      'MIT',
      675.0,
    ),
  ),
  'softvq_sit_b64': _softvq('b-64', -0.003192751, 0.07235257),
  'softvq_sit_bl64': _softvq('bl-64', -0.00077168207, 0.07157949),
  'softvq_sit_l64': _softvq('l-64', 0.0009714666, 0.07259091),
}


# Arrays of a single family. A file without any is of SiT, or of REPA without
# its projector; the two differ in the direction of time.
_MARKS = {
  'wg_norm.weight': 'reg',
  'final_layer.norm_final.weight': 'lightningdit',
  'feat_rope.freqs_cos': 'lightningdit',
  'x_embedder.weight': 'softvq',
  'projectors.0.0.weight': 'repa',
}


def fields(
  arrays: Arrays, family: str, source: str, *, heads: int = 0
) -> dict[str, Any]:
  """Fields of the `sit.SiT` of a state dict.

  Args:
    arrays: by the names of the file.
    family: one of FAMILIES, as which to read it.
    source: names the file in errors.
    heads: attention heads; 0 derives them from the arrays, or from HEADS.

  Raises:
    WeightsError: arrays of another family, arrays without sizes, or a width
      whose number of heads is unknown.
  """
  _check_family(arrays, family, source)
  try:
    found = _sizes(arrays)
  except (KeyError, ValueError) as error:
    raise errors.WeightsError(
      f'{source} is no SiT ({error}, in {len(arrays)} arrays); wanted a state '
      'dict of SiT, REPA, REG, LightningDiT or of the SiT of SoftVQ'
    ) from error
  width = found['width']
  heads = heads or _heads_of(arrays, width) or HEADS.get(width, 0)
  if not heads or width % heads:
    raise errors.WeightsError(
      f'{source} is {width} wide, and does not tell its attention heads '
      f'({heads or "unknown"}); wanted a divisor of {width}, as in --heads=16'
    )
  return {**found, 'heads': heads}


def _check_family(arrays: Arrays, family: str, source: str) -> None:
  """WeightsError where arrays are those of another family."""
  found = next((f for mark, f in _MARKS.items() if mark in arrays), 'sit')
  if found != family and (found, family) != ('sit', 'repa'):
    raise errors.WeightsError(
      f'{source} is to be read as {family}, and by its arrays is {found}; name '
      f'the network that it is: {", ".join(_of_family(found))}'
    )


def _of_family(family: str) -> list[str]:
  return [name for name, kind in RELEASED.items() if kind.family == family]


def _heads_of(arrays: Arrays, width: int) -> int:
  """Number of heads, from norms or rotations of one; 0 if there are none."""
  for name in ('blocks.0.attn.q_norm.weight', 'feat_rope.freqs_cos'):
    if name in arrays:
      return width // arrays[name].shape[-1]
  return 0


def _sizes(arrays: Arrays) -> dict[str, Any]:
  """Fields of the SiT from the shapes of its arrays."""
  shape = functools.partial(weight_reader.shape_of, arrays)

  def has(name: str) -> bool:
    return name in arrays

  if has('x_embedder.weight'):
    positions, (width, token_dim) = '1d', shape('x_embedder.weight', 2)
  else:
    width, channels, patch, _ = shape('x_embedder.proj.weight', 4)
    positions, token_dim = '2d', channels * patch**2
  _, places, _ = shape('pos_embed', 3)
  labels, _ = shape('y_embedder.embedding_table.weight', 2)
  parts, _ = shape('blocks.0.adaLN_modulation.1.weight', 2)
  gated = has('blocks.0.mlp.w3.weight')
  _, hidden = shape(f'blocks.0.mlp.{"w3" if gated else "fc2"}.weight', 2)
  cls_dim = shape('cls_projectors2.weight', 2)[1] if has('wg_norm.bias') else 0
  found = {
    'num_tokens': places - (cls_dim > 0),
    'token_dim': token_dim,
    'num_classes': labels - 1,
    'width': width,
    'depth': len({n.split('.')[1] for n in arrays if n.startswith('blocks.')}),
    'mlp_ratio': swiglu_ratio(hidden, width) if gated else hidden / width,
    'cls_dim': cls_dim,
    'align_dim': 0,
    'positions': positions,
    'norm': 'rms' if has('final_layer.norm_final.weight') else 'layer',
    'mlp': 'swiglu' if gated else 'gelu',
    'qk_norm': has('blocks.0.attn.q_norm.weight'),
    'rope': has('feat_rope.freqs_cos'),
    'shift': parts == 6 * width,
  }
  if has('projectors.0.4.bias'):
    found['align_dim'], _ = shape('projectors.0.4.weight', 2)
    found['projector_width'], _ = shape('projectors.0.0.weight', 2)
  return found


@dataclasses.dataclass(frozen=True)
class CodeBase:
  """Conventions of one code base.

  Attributes:
    data_at_one: True if its time is 0 at the noise and 1 at the data; ours, and
      that of all others, is 0 at the data.
    unused: names in its files, as patterns, of constants that we compute.
  """

  data_at_one: bool = False
  unused: tuple[str, ...] = ()


FAMILIES = {
  'sit': CodeBase(data_at_one=True),
  'repa': CodeBase(),
  'reg': CodeBase(),
  'softvq': CodeBase(),
  'lightningdit': CodeBase(data_at_one=True, unused=('feat_rope.*',)),
}

_TIME_FEATURES = 256
# Tables of positions are constants, but may have been stored in 16 bits.
_POSITIONS_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class FileForm:
  """Describes the layout of a file, where layouts differ.

  Attributes:
    embed: name of the embedding: a Linear, or a convolution '....proj'.
    patch_size: of the convolution.
    learn_sigma: whether the last layer predicts a variance too, which nobody
      uses: twice the channels, the velocity first.
    data_at_one: see `CodeBase`.
  """

  embed: str
  patch_size: int
  learn_sigma: bool
  data_at_one: bool


def read(
  arrays: Arrays,
  model: sit.SiT,
  family: str,
  source: str,
) -> dict[str, PyTree]:
  """Parameters of `model` from a state dict.

  Args:
    arrays: by the names of the file.
    model: as `fields` describes it.
    family: one of FAMILIES.
    source: names the file in errors.

  Returns:
    Parameters by module, float32 on the host.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite; or positions that are not the fixed ones.
  """
  positions = _positions(model)
  reader = Reader(arrays)
  table = reader.take('pos_embed', 1, *positions.shape)
  params = assemble(reader, model, form_of(arrays, model, family))
  reader.check(
    f'{family} of width {model.width}', source, FAMILIES[family].unused
  )
  gap = np.abs(table[0] - positions).max()
  if gap > _POSITIONS_TOLERANCE:
    raise errors.WeightsError(
      f'{source} does not fit: its pos_embed is up to {gap:.2g} away from the '
      'fixed sines and cosines; give a file of a network that has these'
    )
  return jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float32), jax.device_get(params)
  )


def form_of(arrays: Arrays, model: sit.SiT, family: str) -> FileForm:
  """The form of a state dict for `model`."""
  kernel = arrays.get('x_embedder.proj.weight')
  bias = arrays.get('final_layer.linear.bias')
  return FileForm(
    embed='x_embedder' if 'x_embedder.weight' in arrays else 'x_embedder.proj',
    patch_size=1 if kernel is None or kernel.ndim != 4 else kernel.shape[-1],
    learn_sigma=getattr(bias, 'shape', ()) == (2 * model.token_dim,),
    data_at_one=FAMILIES[family].data_at_one,
  )


def assemble(
  reader: Reader, model: sit.SiT, form: FileForm
) -> dict[str, PyTree]:
  """Parameters from arrays: copies, transpositions and sums, thus linear.

  Traceable, so that a gradient goes back to the names of the file.
  """
  width = model.width
  first = reader.linear('t_embedder.mlp.0', _TIME_FEATURES, width)
  if form.data_at_one:
    first['kernel'] = reverse_time(first['kernel'])
  params = {
    'token_embed': _embedding(reader, model, form),
    'time0': first,
    'time1': reader.linear('t_embedder.mlp.2', width, width),
    'label_table': {
      'embedding': reader.take(
        'y_embedder.embedding_table.weight', model.num_classes + 1, width
      )
    },
    'modulation': reader.linear(
      'final_layer.adaLN_modulation.1', width, 2 * width
    ),
    'to_velocity': _velocity(reader, model, form),
  }
  if model.norm == 'rms':
    params['norm'] = reader.scale('final_layer.norm_final', width)
  if model.cls_dim:
    cls = model.cls_dim
    params |= {
      'cls_embed': reader.linear('cls_projectors2', cls, width),
      'cls_norm': reader.norm('wg_norm', width),
      'to_cls_velocity': reader.linear('final_layer.linear_cls', width, cls),
    }
  if model.align_dim:
    # REPA's projector; REG has the same one for the class token.
    hidden, outputs = model.projector_width, model.align_dim
    params['projector'] = {
      'layer0': reader.linear('projectors.0.0', width, hidden),
      'layer1': reader.linear('projectors.0.2', hidden, hidden),
      'layer2': reader.linear('projectors.0.4', hidden, outputs),
    }
  for begin, end in model.segments:
    blocks = [_block(reader, f'blocks.{i}', model) for i in range(begin, end)]
    params[transformer.segment_name(begin)] = {
      'block': weight_reader.stack(blocks)
    }
  return params


def reverse_time(kernel: Float[Any, 'f d']) -> Float[Array, 'f d']:
  """Makes the first Linear of the time read t where it read 1 - t.

  Its features are cos(w t) and sin(w t). Those of 1 - t are rotations by w,
    cos(w (1 - t)) = cos(w) cos(w t) + sin(w) sin(w t),
    sin(w (1 - t)) = sin(w) cos(w t) - cos(w) sin(w t),
  so the Linear takes them in. This is its own inverse. The rotation is computed
  in float64, as far as `kernel` is not traced.
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


def _embedding(
  reader: Reader, model: sit.SiT, form: FileForm
) -> dict[str, Any]:
  """The embedding of tokens: of 2D latents it is a convolution in the file."""
  if form.embed == 'x_embedder':
    return reader.linear(form.embed, model.token_dim, model.width)
  channels = model.token_dim // form.patch_size**2
  return reader.patch_embed(form.embed, channels, model.width, form.patch_size)


def _velocity(reader: Reader, model: sit.SiT, form: FileForm) -> PyTree:
  """The last layer, whose sign turns with the direction of time."""
  outputs, halves = model.token_dim, 1 + form.learn_sigma
  layer = reader.linear('final_layer.linear', model.width, halves * outputs)
  sign = -1 if form.data_at_one else 1

  def velocity(leaf: Any) -> Any:
    # The outputs of a token run over (place in the patch, channel); channels of
    # the velocity come before those of the variance at every place.
    leaf = leaf.reshape(*leaf.shape[:-1], form.patch_size**2, halves, -1)
    return sign * leaf[..., 0, :].reshape(*leaf.shape[:-3], outputs)

  return jax.tree.map(velocity, layer)


def _block(reader: Reader, name: str, model: sit.SiT) -> dict[str, Any]:
  """Parameters of one block."""
  width, rms = model.width, model.norm == 'rms'
  attention = {
    'qkv': reader.linear(f'{name}.attn.qkv', width, 3 * width),
    'out': reader.linear(f'{name}.attn.proj', width, width),
  }
  if model.qk_norm:
    norm = reader.scale if rms else reader.norm
    of_head = width // model.heads
    attention['query_norm'] = norm(f'{name}.attn.q_norm', of_head)
    attention['key_norm'] = norm(f'{name}.attn.k_norm', of_head)
  if model.mlp == 'swiglu':
    # Both halves of the gated layer are one matrix.
    hidden = _swiglu_hidden(width, model.mlp_ratio)
    up, down, doubled = 'mlp.w12', 'mlp.w3', 2
  else:
    hidden = round(width * model.mlp_ratio)
    up, down, doubled = 'mlp.fc1', 'mlp.fc2', 1
  parts = 6 if model.shift else 4
  block = {
    'attn': attention,
    'mlp': {
      'up': reader.linear(f'{name}.{up}', width, doubled * hidden),
      'down': reader.linear(f'{name}.{down}', hidden, width),
    },
    'modulation': reader.linear(
      f'{name}.adaLN_modulation.1', width, parts * width
    ),
  }
  if rms:
    block['norm1'] = reader.scale(f'{name}.norm1', width)
    block['norm2'] = reader.scale(f'{name}.norm2', width)
  return block


def swiglu_ratio(hidden: int, width: int) -> float:
  """The ratio at which `layers.SwiGlu` is `hidden` wide on `width` inputs.

  The nominal width is 1.5 times `hidden`, of which SwiGlu takes two thirds and
  drops the fraction.
  """
  nominal = math.ceil(1.5 * hidden)
  ratio = nominal / width
  # The quotient may be rounded down, and the product then miss `nominal`.
  return ratio if int(width * ratio) == nominal else math.nextafter(ratio, 1e9)


def _swiglu_hidden(width: int, ratio: float) -> int:
  """Hidden width of `layers.SwiGlu`."""
  return int(2 / 3 * int(width * ratio))


def _positions(model: sit.SiT) -> Float[np.ndarray, 'k d']:
  """The fixed positions; zeros for the class token where there is one."""
  if model.positions == '1d':
    table = layers.sincos_1d(model.num_tokens, model.width)
  else:
    table = layers.sincos_2d(round(model.num_tokens**0.5), model.width)
  return np.pad(table, ((int(model.cls_dim > 0), 0), (0, 0)))
