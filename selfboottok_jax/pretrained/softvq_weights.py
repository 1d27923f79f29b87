"""Released state dicts of SoftVQ-VAE as parameters of `models.tokenizer`.

Names are those on the hub (SoftVQVAE/softvq-b-64 and its siblings), whose
transformers are timm's.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.models import tokenizer_params
from selfboottok_jax.pretrained import convert

# A name and a shape to the array.
Take = convert.Take

# The teacher, a patch embedding that the decoder's class brings along, and a
# record of the codes that were met.
UNUSED = ('repa_model.', 'decoder.model.patch_embed.', 'quantize.codebook_used')
HEAD = tokenizer_params.PROJECTOR + 'repa_global'


def read(
  arrays: Mapping[str, np.ndarray],
  model: tokenizer_lib.Tokenizer,
  source: str,
) -> dict[str, PyTree]:
  """Parameters of `model` from a state dict.

  Args:
    arrays: by the names of the file.
    model: as `softvq.fields` describes it.
    source: names the file in errors.

  Returns:
    Parameters by module, float32 on the host. Where the file has the head to
    the teacher of Eq. (6), that too, as a training keeps it.

  Raises:
    WeightsError: one message with all that is missing, unexpected, of another
      shape or not finite.
  """
  wanted = {}

  def take(name, *shape):
    wanted[name] = shape
    array = arrays.get(name)
    if array is None or array.shape != shape:
      # `convert.check` will list it with all others.
      return np.zeros(shape, np.float32)
    return np.asarray(array, np.float32)

  params = assemble(take, model)
  if any(name.startswith('projection.') for name in arrays):
    params[HEAD] = assemble_head(take, *_head_widths(arrays, model))
  convert.check(
    arrays,
    wanted,
    f'SoftVQ-VAE at {model.image_size} pixels',
    source,
    unused=[name for name in arrays if name.startswith(UNUSED)],
  )
  return jax.device_get(params)


def assemble(take: Take, model: tokenizer_lib.Tokenizer) -> dict[str, PyTree]:
  """Parameters from arrays: copies, transpositions and sums, thus linear.

  What is added to a constant there, in every step, is added here, once:
  positions to class tokens and queries. Traceable, so that a gradient goes back
  to the names of the file.
  """
  shape = (model.num_codebooks, model.codebook_size, model.token_dim)
  return {
    'encoder': _encoder(take, model),
    'quantizer_global': {'codebook': take('quantize.embedding', *shape)},
    'decoder': _decoder(take, model),
  }


def assemble_head(
  take: Take, inputs: int, width: int, outputs: int
) -> dict[str, PyTree]:
  """The projector that carried tokens to the teacher, as `assemble`."""
  return {
    'layer0': convert.linear(take, 'projection.0', inputs, width),
    'layer1': convert.linear(take, 'projection.2', width, width),
    'layer2': convert.linear(take, 'projection.4', width, outputs),
  }


def _head_widths(arrays, model):
  """What the biases tell; for missing ones, anything: they will be listed."""
  width, outputs = (
    np.size(arrays.get(f'projection.{i}.bias', 0)) for i in (0, 4)
  )
  return model.token_dim, width, outputs


def _encoder(take, model):
  width, p = model.encoder_width, model.patch_size
  tokens = (1, model.num_tokens, width)
  embed = 'encoder.model.patch_embed.proj'
  kernel = take(f'{embed}.weight', width, 3, p, p)
  return {
    'patch_embed': {
      'kernel': kernel.transpose(2, 3, 1, 0).reshape(-1, width),
      'bias': take(f'{embed}.bias', width),
    },
    'latent_queries': take('encoder.latent_tokens', *tokens)
    + take('encoder.latent_pos_embed', *tokens),
    'blocks': {'block': _blocks(take, 'encoder', model)},
    'norm': convert.norm(take, 'encoder.model.norm', width),
    'to_code': convert.linear(take, 'quant_conv', width, model.token_dim),
    **_positions(take, 'encoder', model),
  }


def _decoder(take, model):
  width, p = model.decoder_width, model.patch_size
  tokens = (1, model.num_tokens, width)
  return {
    'mask_token': take('decoder.mask_token', 1, 1, width),
    'from_code': convert.linear(
      take, 'post_quant_conv', model.token_dim, width
    ),
    'token_positions': take('decoder.latent_pos_embed', *tokens),
    'blocks': {'block': {'vit': _blocks(take, 'decoder', model)}},
    'norm': convert.norm(take, 'decoder.model.norm', width),
    'to_pixels': convert.linear(
      take, 'decoder.to_pixel.model', width, 3 * p * p
    ),
    **_positions(take, 'decoder', model),
  }


def _positions(take, side, model):
  """Of the patches; the class token's goes into the token."""
  width = getattr(model, f'{side}_width')
  count = (model.image_size // model.patch_size) ** 2
  table = take(f'{side}.model.pos_embed', 1, 1 + count, width)
  cls = take(f'{side}.model.cls_token', 1, 1, width)
  return {'cls': cls + table[:, :1], 'patch_positions': table[:, 1:]}


def _blocks(take, side, model):
  width, depth = (getattr(model, f'{side}_{of}') for of in ('width', 'depth'))
  hidden = round(width * model.mlp_ratio)
  blocks = [
    _block(take, f'{side}.model.blocks.{index}', width, hidden)
    for index in range(depth)
  ]
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def _block(take, name, width, hidden):
  return {
    'attn': {
      'qkv': convert.linear(take, f'{name}.attn.qkv', width, 3 * width),
      'out': convert.linear(take, f'{name}.attn.proj', width, width),
    },
    'mlp': {
      'up': convert.linear(take, f'{name}.mlp.fc1', width, hidden),
      'down': convert.linear(take, f'{name}.mlp.fc2', hidden, width),
    },
    'norm1': convert.norm(take, f'{name}.norm1', width),
    'norm2': convert.norm(take, f'{name}.norm2', width),
    'scale1': take(f'{name}.ls1.gamma', width),
    'scale2': take(f'{name}.ls2.gamma', width),
  }
