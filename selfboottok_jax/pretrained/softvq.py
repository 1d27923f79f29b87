"""Which Tokenizer a released SoftVQ-VAE is.

Its state dict tells all sizes, and the settings beside it the temperature.
"""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from selfboottok_jax import errors
from selfboottok_jax.pretrained import convert, published

Arrays = Mapping[str, np.ndarray]

WEIGHTS, SETTINGS = 'model.safetensors', 'config.json'
# Of every released size.
HEAD_DIM = 64
TAU = 0.07


def _released(repository: str, millions: float) -> published.Published:
  return published.Published(
    f'SoftVQVAE/{repository}',
    (WEIGHTS,),
    'none stated',
    millions,
    'baseline tokenizer',
  )


# 'softvq' is any other, of which one has to say where it is.
RELEASED: dict[str, published.Published | None] = {
  'softvq_b64': _released('softvq-b-64', 172.9),
  'softvq_bl64': _released('softvq-bl-64', 390.6),
  'softvq_l64': _released('softvq-l-64', 608.2),
  'softvq': None,
}


def fields(
  arrays: Arrays, source: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
  """Fields of the Tokenizer that a state dict is of, `image_size` included.

  Args:
    arrays: by the names of the file.
    source: names the file in errors.
    settings: what is published beside it, if anything; the temperature is read
      there, which no array tells.

  Raises:
    WeightsError: arrays that tell no sizes, or settings of another model.
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
  shape = functools.partial(convert.shape_of, arrays)

  def depth(prefix):
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


def _check_settings(found, settings, source) -> None:
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
