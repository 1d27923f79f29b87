"""Random state dicts of SoftVQ-VAE, under the names that the hub has."""

import numpy as np

# The narrowest that have heads of 64, and no two sizes alike.
SIZES = {
  'image_size': 16,
  'patch_size': 4,
  'num_tokens': 6,
  'token_dim': 5,
  'encoder_width': 64,
  'encoder_depth': 2,
  'decoder_width': 128,
  'decoder_depth': 1,
  'codebook_size': 8,
  'num_codebooks': 3,
}
SETTINGS = {
  'image_size': 16,
  'base_image_size': 256,
  'num_latent_tokens': 6,
  'codebook_size': 8,
  'codebook_embed_dim': 5,
  'num_codebooks': 3,
  'codebook_l2_norm': True,
  'tau': 0.07,
  'enc_type': 'vit',
  'dec_type': 'vit',
  'use_rope': False,
}


def state_dict(*, teacher: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
  """Of SIZES; with a teacher of so many channels, and the head to it."""
  shapes = {
    'encoder.latent_tokens': (1, 6, 64),
    'encoder.latent_pos_embed': (1, 6, 64),
    'decoder.latent_pos_embed': (1, 6, 128),
    'decoder.mask_token': (1, 1, 128),
    'quantize.embedding': (3, 8, 5),
    'quantize.codebook_used': (3, 65536),
    **_linear('quant_conv', 64, 5),
    **_linear('post_quant_conv', 5, 128),
    **_linear('decoder.to_pixel.model', 128, 48),
    **_transformer('encoder.model.', 64, 2),
    **_transformer('decoder.model.', 128, 1),
  }
  if teacher:
    shapes |= _transformer('repa_model.', teacher, 1)
    shapes |= _linear('projection.0', 5, 7)
    shapes |= _linear('projection.2', 7, 7)
    shapes |= _linear('projection.4', 7, teacher)
  rng = np.random.default_rng(seed)
  return {
    name: (shape[-1] ** -0.5 * rng.normal(size=shape)).astype(np.float32)
    for name, shape in shapes.items()
  }


def _transformer(prefix, width, depth):
  shapes = {
    'cls_token': (1, 1, width),
    'pos_embed': (1, 17, width),
    'patch_embed.proj.weight': (width, 3, 4, 4),
    'patch_embed.proj.bias': (width,),
    **_norm('norm', width),
  }
  for i in range(depth):
    block = {
      **_norm('norm1', width),
      **_norm('norm2', width),
      **_linear('attn.qkv', width, 3 * width),
      **_linear('attn.proj', width, width),
      **_linear('mlp.fc1', width, 4 * width),
      **_linear('mlp.fc2', 4 * width, width),
      'ls1.gamma': (width,),
      'ls2.gamma': (width,),
    }
    shapes |= {f'blocks.{i}.{name}': shape for name, shape in block.items()}
  return {prefix + name: shape for name, shape in shapes.items()}


def _linear(name, inputs, outputs):
  return {f'{name}.weight': (outputs, inputs), f'{name}.bias': (outputs,)}


def _norm(name, width):
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}
