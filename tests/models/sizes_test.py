"""The presets of the paper have the numbers of parameters of the paper."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import generator as generator_config
from configs import scaling as scaling_config
from configs import tokenizer as tokenizer_config
from selfboottok_jax import tasks
from selfboottok_jax.evaluation import flops
from selfboottok_jax.models import aligners, sit, tokenizer


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
  counts = {name: tasks.count(tree) / 1e6 for name, tree in params.items()}
  block = params['decoder']['blocks']['block']
  crossing = [name for name in block if name.startswith(('cross', 'gate'))]
  counts['cross'] = sum(tasks.count(block[name]) for name in crossing) / 1e6
  if 'local2d' in params:
    blocks = params['local2d']['blocks']
    counts['aligner_blocks'] = tasks.count(blocks) / 1e6
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
  blocks = tasks.count(params['blocks']) / 1e6
  np.testing.assert_allclose(blocks, millions, rtol=0.02)


@pytest.mark.parametrize(
  ('size', 'millions'), [('s', 33), ('b', 130), ('l', 458), ('xl', 675)]
)
def test_sizes_of_the_generators(size, millions):
  config = generator_config.get_config(f'imagenet256_{size}')
  model = sit.SiT(num_tokens=64, token_dim=32, num_classes=1000, **config.model)
  shapes = jax.eval_shape(
    model.init,
    jax.random.key(0),
    jnp.zeros((1, 64, 32)),
    jnp.zeros((1,)),
    jnp.zeros((1,), jnp.int32),
  )
  # Published counts are rounded to a million and for 2D patches.
  np.testing.assert_allclose(
    tasks.count(shapes['params']) / 1e6, millions, rtol=0.01
  )


# The published multiply-adds are of 65 tokens (REG's class token is one) and
# include its projector, which only training uses.
TOKENS = 65
PROJECTOR = (2048, 2048, 768)


@pytest.mark.parametrize(
  ('size', 'giga_multiply_adds'),
  [('s', 1.9), ('b', 6.1), ('l', 20.5), ('xl', 30.0)],
)
def test_operations_of_the_generators(size, giga_multiply_adds):
  config = generator_config.get_config(f'imagenet256_{size}')
  model = sit.SiT(
    num_tokens=TOKENS, token_dim=32, num_classes=1000, **config.model
  )
  inputs = (
    jax.ShapeDtypeStruct((1, TOKENS, 32), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.float32),
    jax.ShapeDtypeStruct((1,), jnp.int32),
  )
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
  jaxpr = jax.jit(model.apply).trace(params, *inputs).jaxpr
  counted = flops.count(jaxpr, ())[flops.OTHER].total
  widths = (config.model.width, *PROJECTOR)
  projector = TOKENS * sum(a * b for a, b in itertools.pairwise(widths))
  np.testing.assert_allclose(
    counted / 2e9 + projector / 1e9, giga_multiply_adds, rtol=0.03
  )
