"""A teacher as a user loads it, from a file that holds more than it needs."""

import dataclasses

import jax
import numpy as np
import pytest

from selfboottok_jax.pretrained import vision
from tests.golden import fixtures

pytestmark = pytest.mark.golden


def test_siglip_from_a_file_with_a_text_tower():
  recorded = fixtures.load('tokenizer', 'tok08_hf_siglip')
  hf, arrays = recorded.meta['hf'], recorded.arrays
  side = hf['image_size'] // hf['patch_size']
  built = vision.build('siglip2_tiny', grid=side)
  network = dataclasses.replace(
    built,
    vit=built.vit.clone(
      patch_size=hf['patch_size'],
      width=hf['hidden_size'],
      depth=hf['num_hidden_layers'],
      heads=hf['num_attention_heads'],
      hidden=hf['intermediate_size'],
    ),
    family=dataclasses.replace(
      vision.SIGLIP2, grid=side, patch_size=hf['patch_size']
    ),
  )
  more = {'text_model.head.weight': np.zeros(3), 'logit_scale': np.zeros(1)}
  params = network.read({**recorded.weights, **more}, 'a file')
  # Its normalisation, mean and deviation 1/2, leaves [-1, 1] as it is.
  pixels = arrays['in_pixel_values'].transpose(0, 2, 3, 1)
  features = jax.jit(network)(params, pixels)
  for name, value in (
    ('out_last_hidden_state', features.patches),
    ('out_pooler_output', features.cls),
  ):
    fixtures.check(recorded.name, name, value, arrays[name])
