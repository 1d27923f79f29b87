"""The smallest models that still have every part."""

import zlib

import jax
import jax.numpy as jnp
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
  # From numpy: nothing is compiled.
  shape = (batch, TOKENIZER['image_size'], TOKENIZER['image_size'], 3)
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.uniform(-1, 1, shape).astype(np.float32))


def levels(batch: int, seed: int = 0) -> np.ndarray:
  """Images as a training gets them: uint8."""
  shape = (batch, TOKENIZER['image_size'], TOKENIZER['image_size'], 3)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


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


def noise_for(init, key, *args, **kwargs):
  """What `init(key, ...)` returns, made of noise: nothing is compiled.

  For tests that need some parameters, and not those of a first step, whose
  program takes seconds to compile.
  """
  seed = int(jax.random.key_data(key)[-1])
  return jax.tree.map_with_path(
    lambda path, leaf: jnp.asarray(noise(path, leaf, seed)),
    jax.eval_shape(init, key, *args, **kwargs),
  )


def noise(path, leaf, seed: int = 0) -> np.ndarray:
  """Values for a leaf, as large as its name lets it be."""
  names = [str(getattr(key, 'key', getattr(key, 'name', key))) for key in path]
  rng = np.random.default_rng([seed, zlib.crc32('/'.join(names).encode())])
  value = rng.normal(size=leaf.shape)
  match names[-1]:
    case 'kernel':
      value = value / np.sqrt(leaf.shape[-2])
    case 'scale' | 'std' | 'var':
      value = 1 + 0.1 * np.clip(value, -5, 5)
    case 'bias' | 'mean':
      value = 0.1 * value
  return value.astype(leaf.dtype)


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
