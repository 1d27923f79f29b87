"""The presets of the paper have the numbers of parameters of the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import trees
from selfboottok_jax.evaluation import flops
from selfboottok_jax.models import aligners, sit, tokenizer
from selfboottok_jax.presets import generator as generator_config
from selfboottok_jax.presets import scaling as scaling_config
from selfboottok_jax.presets import tokenizer as tokenizer_config


def test_every_preset_passes_the_check():
  for preset in tokenizer_config.PRESETS:
    _preset_model(tokenizer_config.get_config(preset)).check()


def _preset_model(config, **fields):
  return tokenizer.Tokenizer(
    image_size=config.data.image_size, **config.model.to_dict() | fields
  )


def _millions(model):
  size = model.image_size
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), image)['params']
  counts = {name: trees.count(tree) / 1e6 for name, tree in params.items()}
  block = params['decoder']['blocks']['block']
  crossing = [name for name in block if name.startswith(('cross', 'gate'))]
  counts['cross'] = sum(trees.count(block[name]) for name in crossing) / 1e6
  if 'local2d' in params:
    blocks = params['local2d']['blocks']
    counts['aligner_blocks'] = trees.count(blocks) / 1e6
  return counts


def test_sizes_of_the_paper():
  config = tokenizer_config.get_config('imagenet256')
  counts = _millions(_preset_model(config))
  plain = counts['encoder'] + counts['decoder'] - counts['cross']
  np.testing.assert_allclose(plain, 171.9, rtol=0.002)
  np.testing.assert_allclose(counts['cross'], 56.7, rtol=0.02)
  np.testing.assert_allclose(counts['aligner_blocks'], 10.6, rtol=0.02)


@pytest.mark.parametrize(
  ('preset', 'millions'),
  [
    ('imagenet256_10m', 10.6),
    ('imagenet256_100m', 99),
    ('imagenet256_200m', 202),
    ('imagenet256_400m', 403),
    ('imagenet256_600m', 590),
  ],
)
def test_sizes_of_the_scaled_aligners(preset, millions):
  config = scaling_config.get_config(preset)
  model = aligners.Local2D(
    config.model.local2d_width,
    config.model.local2d_depth,
    config.model.local2d_width // 64,
  )
  tokens = jax.ShapeDtypeStruct((1, 64, 32), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens)['params']
  blocks = trees.count(params['blocks']) / 1e6
  np.testing.assert_allclose(blocks, millions, rtol=0.02)


# DINOv2-B's patches and class vector.
REG = {'cls_dim': 768, 'align_dim': 768}


def _generator(size, **fields):
  """A model of a preset, and the shapes of its inputs and parameters."""
  config = generator_config.get_config(f'imagenet256_{size}')
  model = sit.SiT(
    num_tokens=64, token_dim=32, num_classes=1000, **config.model, **fields
  )
  shapes = [(1, 64, 32), (1,)]
  inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  inputs.append(jax.ShapeDtypeStruct((1,), jnp.int32))
  if model.cls_dim:
    inputs.append(jax.ShapeDtypeStruct((1, model.cls_dim), jnp.float32))
  variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  return model, variables, inputs


@pytest.mark.parametrize(
  ('size', 'fields', 'millions'),
  [
    ('s', {}, 33),
    ('b', {}, 130),
    ('l', {}, 458),
    ('xl', {}, 675),
    ('l', REG, 467),
    ('xl', REG, 685),
  ],
)
def test_sizes_of_the_generators(size, fields, millions):
  _, variables, _ = _generator(size, **fields)
  # Published counts are rounded to a million and for 2D patches.
  np.testing.assert_allclose(
    trees.count(variables['params']) / 1e6, millions, rtol=0.01
  )


@pytest.mark.parametrize(
  ('size', 'giga_multiply_adds'),
  [('s', 1.9), ('b', 6.1), ('l', 20.5), ('xl', 30.0)],
)
def test_operations_of_the_generators(size, giga_multiply_adds):
  # Of REG's 65 tokens, with the projector that only training uses.
  model, variables, inputs = _generator(size, **REG)
  key = jax.eval_shape(lambda: jax.random.key(0))

  def train(variables, key, *inputs):
    return model.apply(variables, *inputs, train=True, rngs={'dropout': key})

  jaxpr = jax.jit(train).trace(variables, key, *inputs).jaxpr
  counted = flops.count(jaxpr, ())[flops.OTHER].total
  np.testing.assert_allclose(counted / 2e9, giga_multiply_adds, rtol=0.03)
