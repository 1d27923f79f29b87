"""Vision transformers, from the state dicts of their public classes."""

import functools

import jax
import numpy as np
import pytest

from selfboottok_jax.pretrained import vit
from tests.golden import fixtures

pytestmark = pytest.mark.golden

# Fields of each family that no configuration file of its tells.
FAMILIES = {
  'dinov2': {'layer_scale': True},
  'dinov2_registers': {'layer_scale': True},
  'ijepa': {'cls': False},
  'siglip': {'cls': False, 'gelu': 'tanh', 'pool': True},
}


def _network(family, hf, grid):
  width = hf['hidden_size']
  return vit.Vit(
    grid,
    hf['patch_size'],
    width,
    hf['num_hidden_layers'],
    hf['num_attention_heads'],
    hf.get('intermediate_size') or width * hf['mlp_ratio'],
    registers=hf.get('num_register_tokens', 0),
    taps=(1,),
    **FAMILIES[family],
  )


@functools.cache
def _load(family):
  return fixtures.load('tokenizer', f'tok08_hf_{family}')


@pytest.mark.parametrize('suffix', ['', '_interp'])
@pytest.mark.parametrize('family', list(FAMILIES))
def test_every_recorded_array(family, suffix):
  recorded = _load(family)
  hf = recorded.meta['hf']
  native = (hf['image_size'] // hf['patch_size'],) * 2
  pixels = recorded.arrays[f'in_pixel_values{suffix}'].transpose(0, 2, 3, 1)
  grid = tuple(side // hf['patch_size'] for side in pixels.shape[1:3])
  network = _network(family, hf, grid)
  params = vit.read(
    recorded.weights, network, vit.NAMINGS[family], 'test', grid=native
  )
  output = jax.jit(network.apply)({'params': params}, pixels)
  check = functools.partial(fixtures.check, recorded.name)
  hidden, last = (
    f'out_{name}{suffix}' for name in ('hidden_state_1', 'last_hidden_state')
  )
  check(hidden, output.hidden[1], recorded.arrays[hidden])
  expected = recorded.arrays[last]
  count = grid[0] * grid[1]
  check(last, output.patches, expected[:, -count:])
  pooled = f'out_pooler_output{suffix}'
  if pooled in recorded.arrays:
    check(pooled, output.summary, recorded.arrays[pooled])
  else:
    assert output.summary is None
  assert expected.shape[1] == count + network.cls + network.registers


def test_images_of_any_shape_one_by_one():
  recorded = fixtures.load('tokenizer', 'tok08_hf_siglip2_naflex')
  hf, arrays = dict(recorded.meta['hf']), recorded.arrays
  side = round(hf['num_patches'] ** 0.5)
  weights = dict(recorded.weights)
  name = 'vision_model.embeddings.patch_embedding.weight'
  p = hf['patch_size']
  # There a patch is a flat vector (row, column, colour).
  flat = weights[name].reshape(-1, p, p, 3)
  weights[name] = flat.transpose(0, 3, 1, 2)
  positions = 'vision_model.embeddings.position_embedding.weight'
  table = weights[positions]
  for index, (rows, columns) in enumerate(arrays['in_spatial_shapes']):
    count = int(rows * columns)
    assert arrays['in_pixel_attention_mask'][index].sum() == count
    network = _network('siglip', hf, (int(rows), int(columns)))
    # Positions of these are resized by lines and with antialiasing.
    resized = jax.image.resize(
      table.reshape(side, side, -1), (rows, columns, table.shape[1]), 'bilinear'
    )
    params = vit.read(
      weights | {positions: np.asarray(resized).reshape(count, -1)},
      network,
      vit.NAMINGS['siglip'],
      'test',
    )
    patches = arrays['in_pixel_values'][index, :count]
    pixels = patches.reshape(1, rows, columns, p, p, 3).transpose(
      0, 1, 3, 2, 4, 5
    )
    output = jax.jit(network.apply)(
      {'params': params}, pixels.reshape(1, rows * p, columns * p, 3)
    )
    for key, value in (
      ('out_last_hidden_state', output.patches[0]),
      ('out_hidden_state_1', output.hidden[1][0]),
      ('out_pooler_output', output.summary[0]),
    ):
      expected = arrays[key][index]
      if expected.ndim > 1:
        expected = expected[:count]
      fixtures.check(recorded.name, key, value, expected)


def test_dinov2_at_another_patch_size():
  recorded = fixtures.load('tokenizer', 'tok03_dinov2_resample')
  meta, arrays = recorded.meta, recorded.arrays
  check = functools.partial(fixtures.check, recorded.name)
  source = (meta['src_grid'],) * 2
  width, p = meta['embed_dim'], meta['patch_size']
  side = meta['image_size'] // p

  def read(weights, network):
    return vit.read(
      weights, network, vit.NAMINGS['timm'], 'test', grid=source, patch_size=14
    )

  network = vit.Vit(
    (side, side), p, width, meta['depth'], meta['num_heads'], 4 * width,
    layer_scale=True,
  )  # fmt: skip
  params = read(recorded.weights, network)
  kernel = params['patch_embed']['kernel'].reshape(p, p, 3, width)
  check(
    'out_patch_embed_weight_16',
    kernel.transpose(3, 2, 0, 1),
    arrays['out_patch_embed_weight_16'],
  )
  table = arrays['out_pos_embed_16x16']
  check('out_pos_embed_16x16', params['positions'], table[:, 1:])
  images = arrays['in_image_u8'].transpose(0, 2, 3, 1) / np.float32(127.5) - 1
  output = jax.jit(network.apply)({'params': params}, images)
  features = np.concatenate([output.summary[:, None], output.patches], axis=1)
  check('out_features_256', features, arrays['out_features_256'])
  larger = read(recorded.weights, network.clone(grid=(44, 44), patch_size=8))
  kernel = larger['patch_embed']['kernel'].reshape(8, 8, 3, width)
  check(
    'out_patch_embed_weight_8',
    kernel.transpose(3, 2, 0, 1),
    arrays['out_patch_embed_weight_8'],
  )
  every = arrays['out_pos_embed_44x44_every97']
  check(
    'out_pos_embed_44x44_every97', larger['positions'][:, 96::97], every[:, 1:]
  )
