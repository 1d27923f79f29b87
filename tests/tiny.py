"""The smallest models that still have every part."""

import jax
import numpy as np

from selfboottok_jax.models import tokenizer

TOKENIZER = {
  'image_size': 16,
  'patch_size': 4,
  'num_tokens': 8,
  'token_dim': 4,
  'encoder_width': 16,
  'encoder_depth': 1,
  'decoder_width': 16,
  'decoder_depth': 2,
  'head_dim': 8,
  'codebook_size': 8,
  'num_codebooks': 2,
  'local1d_width': 16,
  'local2d_width': 16,
  'local2d_depth': 1,
}


def make_tokenizer(**fields) -> tokenizer.Tokenizer:
  return tokenizer.Tokenizer(**TOKENIZER | fields)


def images(batch: int, seed: int = 0):
  shape = (batch, TOKENIZER['image_size'], TOKENIZER['image_size'], 3)
  return jax.random.uniform(jax.random.key(seed), shape, minval=-1)


def padded_batches(classes: int) -> list[dict[str, np.ndarray]]:
  """Two batches of 8 with 13 images, the rest padding of another kind."""
  size = TOKENIZER['image_size']
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 256, (16, size, size, 3), np.uint8)
  pictures[13:] = 255
  mask, label = np.arange(16) < 13, np.arange(16, dtype=np.int32) % classes
  return [
    {'image': pictures[s], 'label': label[s], 'mask': mask[s]}
    for s in (slice(8), slice(8, 16))
  ]


def awake(params, scale: float = 0.2):
  """Parameters away from the zeros and ones of the first step."""
  leaves, tree = jax.tree.flatten(params)
  rng = np.random.default_rng(1)
  return tree.unflatten(
    [a + scale * rng.normal(size=a.shape).astype(np.float32) for a in leaves]
  )


def assert_same(actual, expected):
  """Two trees, bit for bit."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def changed(a, b) -> bool:
  """Returns True if any leaf differs."""
  return any(
    np.any(np.asarray(x) != np.asarray(y))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )
