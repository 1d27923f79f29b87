"""Released SoftVQ-VAEs as a `models.tokenizer.Tokenizer`.

`fields` reads the sizes off a state dict, and the temperature off the settings
beside it; `read` takes the parameters. Names are those on the hub
(SoftVQVAE/softvq-b-64 and its siblings), whose transformers are timm's.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from selfboottok_jax import errors, sizes
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.pretrained import contract, weight_reader

Arrays = weight_reader.Arrays
Reader = weight_reader.Reader

WEIGHTS, SETTINGS = 'model.safetensors', 'config.json'
# Width of an attention head in every released size, and the usual temperature.
HEAD_DIM = 64
TAU = 0.07


def _released(repository: str, millions: float) -> contract.Published:
  return contract.Published(
    f'SoftVQVAE/{repository}',
    (WEIGHTS,),
    'none stated',
    millions,
    'baseline tokenizer',
  )


# 'softvq' is any other, whose source has to be named.
RELEASED: dict[str, contract.Published | None] = {
  'softvq_b64': _released('softvq-b-64', 172.9),
  'softvq_bl64': _released('softvq-bl-64', 390.6),
  'softvq_l64': _released('softvq-l-64', 608.2),
  'softvq': None,
}


def fields(
  arrays: Arrays, source: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
  """Fields of the Tokenizer of a state dict, `image_size` included.

  Args:
    arrays: by the names of the file.
    source: names the file in errors.
    settings: settings that are published beside it, if any; they have the
      temperature, which no array reveals.

  Raises:
    WeightsError: arrays without sizes, or settings of another model.
  """
  try:
    found = _sizes(arrays)
  except (KeyError, ValueError) as error:
    raise errors.WeightsError(
      f'{source} is no SoftVQ-VAE with transformers ({error}, in '
      f'{len(arrays)} arrays); wanted a state dict such as '
      'SoftVQVAE/softvq-b-64'
    ) from error
  _check_settings(found, settings, source)
  return found | {
    'tau': float(settings.get('tau', TAU)),
    'head_dim': HEAD_DIM,
    'assignment': 'cosine',
    # Codes are mixtures already, and are not mixed again.
    'bootstrap_from': 'quantized',
    'unit_rms': False,
    'layer_scale': 1e-5,
    'local1d_width': 0,
    'local2d_depth': 0,
  }


def _sizes(arrays: Arrays) -> dict[str, Any]:
  """Fields of the Tokenizer from the shapes of its arrays."""
  shape = functools.partial(weight_reader.shape_of, arrays)

  def depth(prefix: str) -> int:
    names = [n for n in arrays if n.startswith(f'{prefix}.model.blocks.')]
    return len({name.split('.')[3] for name in names})

  width, _, patch, _ = shape('encoder.model.patch_embed.proj.weight', 4)
  _, positions, _ = shape('encoder.model.pos_embed', 3)
  _, tokens, _ = shape('encoder.latent_tokens', 3)
  codebooks, size, dim = shape('quantize.embedding', 3)
  decoder_width, _ = shape('post_quant_conv.weight', 2)
  hidden, _ = shape('encoder.model.blocks.0.mlp.fc1.weight', 2)
  shape('decoder.model.blocks.0.mlp.fc1.weight', 2)
  return {
    'image_size': patch * round((positions - 1) ** 0.5),
    'patch_size': patch,
    'num_tokens': tokens,
    'token_dim': dim,
    'encoder_width': width,
    'encoder_depth': depth('encoder'),
    'decoder_width': decoder_width,
    'decoder_depth': depth('decoder'),
    'mlp_ratio': hidden / width,
    'codebook_size': size,
    'num_codebooks': codebooks,
  }


def _check_settings(
  found: Mapping[str, Any], settings: Mapping[str, Any], source: str
) -> None:
  """WeightsError for settings that contradict arrays or cannot be followed."""
  wanted = {
    'image_size': found['image_size'],
    'enc_patch_size': found['patch_size'],
    'dec_patch_size': found['patch_size'],
    'num_latent_tokens': found['num_tokens'],
    'codebook_size': found['codebook_size'],
    'codebook_embed_dim': found['token_dim'],
    'num_codebooks': found['num_codebooks'],
    'codebook_l2_norm': True,
    'enc_type': 'vit',
    'dec_type': 'vit',
    'dec_cls_token': True,
    'to_pixel': 'linear',
    'use_ape': True,
    'use_rope': False,
  }
  wrong = [
    f'{name}={settings[name]!r}, wanted {value!r}'
    for name, value in wanted.items()
    if settings.get(name, value) != value
  ]
  tau = settings.get('tau', TAU)
  if not (isinstance(tau, int | float) and tau > 0):
    wrong.append(f'tau={tau!r}, wanted a number above 0')
  if wrong:
    raise errors.WeightsError(
      f'the config.json of {source} is of another model than its arrays or '
      f'than can be read: {"; ".join(wrong)}; give the two files of one '
      'SoftVQ-VAE with transformers'
    )


# The teacher, a patch embedding that the decoder's class brings along, and a
# record of the codes in use.
_UNUSED = (
  'repa_model.*',
  'decoder.model.patch_embed.*',
  'quantize.codebook_used*',
)
HEAD = tokenizer_lib.PROJECTOR + 'repa_global'


def read(
  arrays: Arrays, model: tokenizer_lib.Tokenizer, source: str
) -> dict[str, PyTree]:
  """Parameters of `model` from a state dict.

  Args:
    arrays: by the names of the file.
    model: as `fields` describes it.
    source: names the file in errors.

  Returns:
    Parameters by module, float32 on the host. Where the file has the head to
    the teacher of Eq. (6), that too, as a training keeps it.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite.
  """
  reader = Reader(arrays)
  params = assemble(reader, model)
  if any(name.startswith('projection.') for name in arrays):
    # Missing biases give a wrong width, which `check` will list.
    width, outputs = (
      np.size(arrays.get(f'projection.{i}.bias', 0)) for i in (0, 4)
    )
    params[HEAD] = assemble_head(reader, model.token_dim, width, outputs)
  reader.check(f'SoftVQ-VAE at {model.image_size} pixels', source, _UNUSED)
  return jax.device_get(params)


def assemble(
  reader: Reader, model: tokenizer_lib.Tokenizer
) -> dict[str, PyTree]:
  """Parameters from arrays: copies, transpositions and sums, thus linear.

  Constants that are added in every step there are added here, once: positions
  to class tokens and queries. Traceable, so that a gradient goes back to the
  names of the file.
  """
  shape = (model.num_codebooks, model.codebook_size, model.token_dim)
  return {
    'encoder': _encoder(reader, model),
    'quantizer_global': {'codebook': reader.take('quantize.embedding', *shape)},
    'decoder': _decoder(reader, model),
  }


def assemble_head(
  reader: Reader, inputs: int, width: int, outputs: int
) -> dict[str, PyTree]:
  """The projector of tokens to the teacher, as `assemble`."""
  return {
    'layer0': reader.linear('projection.0', inputs, width),
    'layer1': reader.linear('projection.2', width, width),
    'layer2': reader.linear('projection.4', width, outputs),
  }


def _encoder(
  reader: Reader, model: tokenizer_lib.Tokenizer
) -> dict[str, PyTree]:
  width = model.encoder_width
  tokens = (1, model.num_tokens, width)
  return {
    'patch_embed': reader.patch_embed(
      'encoder.model.patch_embed.proj', 3, width, model.patch_size
    ),
    'latent_queries': reader.take('encoder.latent_tokens', *tokens)
    + reader.take('encoder.latent_pos_embed', *tokens),
    'blocks': {'block': _blocks(reader, 'encoder', model)},
    'norm': reader.norm('encoder.model.norm', width),
    'to_code': reader.linear('quant_conv', width, model.token_dim),
    **_positions(reader, 'encoder', model),
  }


def _decoder(
  reader: Reader, model: tokenizer_lib.Tokenizer
) -> dict[str, PyTree]:
  width, pixels = model.decoder_width, 3 * model.patch_size**2
  tokens = (1, model.num_tokens, width)
  return {
    'mask_token': reader.take('decoder.mask_token', 1, 1, width),
    'from_code': reader.linear('post_quant_conv', model.token_dim, width),
    'token_positions': reader.take('decoder.latent_pos_embed', *tokens),
    'blocks': {'block': {'vit': _blocks(reader, 'decoder', model)}},
    'norm': reader.norm('decoder.model.norm', width),
    'to_pixels': reader.linear('decoder.to_pixel.model', width, pixels),
    **_positions(reader, 'decoder', model),
  }


def _positions(
  reader: Reader, side: str, model: tokenizer_lib.Tokenizer
) -> dict[str, Any]:
  """Positions of the patches; the class token's goes into the token."""
  width = getattr(model, f'{side}_width')
  count = math.prod(sizes.grid(model.image_size, model.patch_size))
  table = reader.take(f'{side}.model.pos_embed', 1, 1 + count, width)
  cls = reader.take(f'{side}.model.cls_token', 1, 1, width)
  return {'cls': cls + table[:, :1], 'patch_positions': table[:, 1:]}


def _blocks(
  reader: Reader, side: str, model: tokenizer_lib.Tokenizer
) -> PyTree:
  width, depth = (getattr(model, f'{side}_{of}') for of in ('width', 'depth'))
  hidden = round(width * model.mlp_ratio)
  blocks = []
  for index in range(depth):
    name = f'{side}.model.blocks.{index}'
    blocks.append(
      {
        'attn': {
          'qkv': reader.linear(f'{name}.attn.qkv', width, 3 * width),
          'out': reader.linear(f'{name}.attn.proj', width, width),
        },
        'mlp': {
          'up': reader.linear(f'{name}.mlp.fc1', width, hidden),
          'down': reader.linear(f'{name}.mlp.fc2', hidden, width),
        },
        'norm1': reader.norm(f'{name}.norm1', width),
        'norm2': reader.norm(f'{name}.norm2', width),
        'scale1': reader.take(f'{name}.ls1.gamma', width),
        'scale2': reader.take(f'{name}.ls2.gamma', width),
      }
    )
  return weight_reader.stack(blocks)
