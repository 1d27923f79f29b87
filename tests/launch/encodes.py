"""Tiny caches, and what a training would compute in their place."""

import jax.numpy as jnp
import numpy as np

from selfboottok_jax import data, inference, pixels
from selfboottok_jax.data import transforms
from selfboottok_jax.stages import frozen_encoders
from tests.launch import tiny

CONFIG = '--config=tests/launch/tiny.py:generator'


def arguments(runs, photos, out, *more):
  return [
    CONFIG,
    f'--config.tokenizer={runs / "tokenizer"}',
    '--config.data.source=auto',
    f'--config.data.path={photos}',
    f'--out={out}',
    *more,
  ]


def encode(server, runs, photos, out, *more):
  result = server.run('encode', *arguments(runs, photos, out, *more))
  assert result.code == 0, result.err
  return result


def config(runs, photos, cache=''):
  config = tiny.get_config('generator')
  config.tokenizer = str(runs / 'tokenizer')
  config.data.source, config.data.path = 'auto', str(photos)
  config.data.cache = str(cache)
  return config


def encoding(runs, config):
  tokenizer = inference.load_tokenizer(runs / 'tokenizer')
  return tokenizer, frozen_encoders.from_config(
    config, tokenizer.image_encoder, tokenizer.patch_size
  )


def online(config, encoding, split):
  """Encodes centre crops and their mirror images as a training would."""
  source = data.open_source('auto', config.data.path, split, 16)
  crops = np.stack(
    [transforms.center_crop(source[i]['image'], 16) for i in range(len(source))]
  )
  sides = np.stack([crops, crops[:, :, ::-1]], 1).reshape(-1, 16, 16, 3)
  made = encoding(encoding.params, jnp.asarray(pixels.to_float(sides)))
  return source, {
    name: np.asarray(leaf).reshape(-1, 2, *leaf.shape[1:])
    for name, leaf in made.items()
  }
