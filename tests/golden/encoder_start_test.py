"""DINOv2 at another patch size and grid, on its way into the encoder."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy

from selfboottok_jax.pretrained import vit
from selfboottok_jax.stages import initialization
from tests.golden import fixtures

pytestmark = pytest.mark.golden


@pytest.mark.parametrize(
  ('suffix', 'naming'), [('', 'timm'), ('_hf', 'dinov2')]
)
def test_is_what_the_reference_starts_from(suffix, naming):
  recorded = fixtures.load('tokenizer', 'tok03_dinov2_resample')
  meta, arrays = recorded.meta, recorded.arrays
  file = fixtures.path('tokenizer', recorded.name)
  weights = safetensors.numpy.load_file(
    file.with_name(f'{recorded.name}{suffix}.safetensors')
  )
  check = functools.partial(fixtures.check, recorded.name)
  width, p = meta['embed_dim'], meta['patch_size']
  side = meta['image_size'] // p
  network = vit.Vit(
    initialization.GRID, initialization.PATCH_SIZE, width, meta['depth'],
    meta['num_heads'], 4 * width, layer_scale=True,
  )  # fmt: skip
  params = vit.read(weights, network, vit.NAMINGS[naming], 'test')
  mapped = initialization.encoder_params(network, params, side, p)

  kernel = mapped['patch_embed']['kernel'].reshape(p, p, 3, width)
  check(
    'out_patch_embed_weight_16',
    kernel.transpose(3, 2, 0, 1),
    arrays['out_patch_embed_weight_16'],
  )
  table = arrays['out_pos_embed_16x16']
  check('out_pos_embed_16x16', mapped['patch_positions'], table[:, 1:])

  # Back under the names of the transformer, all of it in one output.
  mapped['positions'] = mapped.pop('patch_positions')
  mapped['blocks_0'] = mapped.pop('blocks')
  images = arrays['in_image_u8'].transpose(0, 2, 3, 1) / np.float32(127.5) - 1
  apply = jax.jit(network.clone(grid=(side, side), patch_size=p).apply)
  output = apply({'params': mapped}, images)
  features = np.concatenate([output.summary[:, None], output.patches], axis=1)
  check('out_features_256', features, arrays['out_features_256'])
