"""Random state dicts of SiT and its descendants, under their own names."""

import numpy as np

from selfboottok_jax.models import layers

# No two sizes alike; a head is 8 wide. A grid of 4 x 4 places.
WIDTH, DEPTH, HEADS, CLASSES, SIDE = 16, 3, 2, 5, 4
CLS, PROJECTOR = 12, 20
TOKEN_DIM = 32
# Latents along the side of a place.
PATCHES = {'sit': 2, 'repa': 2, 'reg': 2, 'lightningdit': 1, 'softvq': 1}


def state_dict(
  family: str,
  *,
  learn_sigma: bool = False,
  side: int = SIDE,
  token_dim: int = TOKEN_DIM,
  cls: int = CLS,
  depth: int = DEPTH,
  seed: int = 0,
) -> dict[str, np.ndarray]:
  """Of one of `sit_weights.FAMILIES`; SiT's own is published with a sigma."""
  patch, gated = PATCHES[family], family == 'lightningdit'
  outputs = token_dim * (1 + learn_sigma)
  embed = 'x_embedder' if family == 'softvq' else 'x_embedder.proj'
  shapes = {
    f'{embed}.weight': (WIDTH, token_dim // patch**2, patch, patch),
    f'{embed}.bias': (WIDTH,),
    **_linear('t_embedder.mlp.0', 256, WIDTH),
    **_linear('t_embedder.mlp.2', WIDTH, WIDTH),
    'y_embedder.embedding_table.weight': (CLASSES + 1, WIDTH),
    **_linear('final_layer.adaLN_modulation.1', WIDTH, 2 * WIDTH),
    **_linear('final_layer.linear', WIDTH, outputs),
  }
  if family == 'softvq':
    shapes[f'{embed}.weight'] = (WIDTH, token_dim)
  for index in range(depth):
    shapes |= _block(f'blocks.{index}', gated)
  if gated:
    shapes['final_layer.norm_final.weight'] = (WIDTH,)
  if family in ('repa', 'reg'):
    shapes |= _linear('projectors.0.0', WIDTH, PROJECTOR)
    shapes |= _linear('projectors.0.2', PROJECTOR, PROJECTOR)
    shapes |= _linear('projectors.0.4', PROJECTOR, cls)
  if family == 'reg':
    shapes |= _linear('cls_projectors2', cls, WIDTH)
    shapes |= {'wg_norm.weight': (WIDTH,), 'wg_norm.bias': (WIDTH,)}
    shapes |= _linear('final_layer.linear_cls', WIDTH, cls)
  rng = np.random.default_rng(seed)
  arrays = {
    name: (shape[-1] ** -0.5 * rng.normal(size=shape)).astype(np.float32)
    for name, shape in shapes.items()
  }
  table = layers.sincos_2d(side, WIDTH)
  if family == 'softvq':
    table = layers.sincos_1d(side**2, WIDTH)
  arrays['pos_embed'] = np.pad(table, ((family == 'reg', 0), (0, 0)))[None]
  if gated:
    angles = layers.rotary_angles((side, side), WIDTH // HEADS)
    for name, function in (('cos', np.cos), ('sin', np.sin)):
      table = np.repeat(function(angles), 2, axis=-1)
      arrays[f'feat_rope.freqs_{name}'] = table
  return arrays


def _block(name, gated):
  hidden = int(2 / 3 * 4 * WIDTH) if gated else 4 * WIDTH
  shapes = {
    **_linear(f'{name}.attn.qkv', WIDTH, 3 * WIDTH),
    **_linear(f'{name}.attn.proj', WIDTH, WIDTH),
    **_linear(f'{name}.adaLN_modulation.1', WIDTH, 6 * WIDTH),
  }
  if not gated:
    shapes |= _linear(f'{name}.mlp.fc1', WIDTH, hidden)
    return shapes | _linear(f'{name}.mlp.fc2', hidden, WIDTH)
  shapes |= {f'{name}.norm{i}.weight': (WIDTH,) for i in (1, 2)}
  shapes |= _linear(f'{name}.mlp.w12', WIDTH, 2 * hidden)
  return shapes | _linear(f'{name}.mlp.w3', hidden, WIDTH)


def _linear(name, inputs, outputs):
  return {f'{name}.weight': (outputs, inputs), f'{name}.bias': (outputs,)}
