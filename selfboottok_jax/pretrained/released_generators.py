"""Which SiT a released generator is, and of which codes.

Its state dict tells all sizes but the heads, which go by the width.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfboottok_jax import errors
from selfboottok_jax.pretrained import convert, published

Arrays = Mapping[str, np.ndarray]

# Attention heads by width, of S, B, L and XL.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


@dataclasses.dataclass(frozen=True)
class Generator:
  """A kind of generator whose state dicts can be imported.

  Attributes:
    family: one of `sit_weights.FAMILIES`.
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
  published: published.Published
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mean: float = 0.0
  std: float = 1.0


def _published(hub: str, file: str, licence: str, millions: float, url=''):
  return published.Published(
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


# The latents of SD-VAE and VA-VAE are normalised where they are made.
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
  # The file's name there is not known; that of its authors' own scripts.
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


# What only one family has. A file without any is one of SiT, or of REPA without
# its projector, and runs the other way in time.
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
  """Fields of the `sit.SiT` that a state dict is of, as far as it tells them.

  Args:
    arrays: by the names of the file.
    family: one of `sit_weights.FAMILIES`, as which it is to be read.
    source: names the file in errors.
    heads: attention heads; 0 goes by what the arrays tell or by HEADS.

  Raises:
    WeightsError: arrays of another family or that tell no sizes, or a width of
      unknown heads.
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
  heads = heads or _told_heads(arrays, width) or HEADS.get(width, 0)
  if not heads or width % heads:
    raise errors.WeightsError(
      f'{source} is {width} wide, and does not tell its attention heads '
      f'({heads or "unknown"}); wanted a divisor of {width}, as in --heads=16'
    )
  return {**found, 'heads': heads}


def _check_family(arrays, family, source) -> None:
  """WeightsError where arrays are those of another family."""
  found = next((f for mark, f in _MARKS.items() if mark in arrays), 'sit')
  if found != family and (found, family) != ('sit', 'repa'):
    raise errors.WeightsError(
      f'{source} is to be read as {family}, and by its arrays is {found}; name '
      f'the network that it is: {", ".join(_of_family(found))}'
    )


def _of_family(family: str) -> list[str]:
  return [name for name, kind in RELEASED.items() if kind.family == family]


def _told_heads(arrays, width) -> int:
  """Heads by the width of one, where norms or rotations have it."""
  for name in ('blocks.0.attn.q_norm.weight', 'feat_rope.freqs_cos'):
    if name in arrays:
      return width // arrays[name].shape[-1]
  return 0


def _sizes(arrays) -> dict[str, Any]:
  shape = functools.partial(convert.shape_of, arrays)

  def has(name):
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
    # A gated MLP has two thirds of its nominal width, rounded down.
    'mlp_ratio': (math.ceil(1.5 * hidden) if gated else hidden) / width,
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
