"""The program that makes what a token cache holds."""

import collections
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from selfboottok_jax import pixels
from selfboottok_jax.data import token_cache
from selfboottok_jax.stages import frozen_encoders
from selfboottok_jax.training import sharding

# Batches that are started and not fetched: one is encoded while another is
# written, and a third would only take memory.
UNDER_WAY = 2


class Encoder:
  """One program for images and their mirror images, on this process's devices.

  Attributes:
    batch_size: images at a time.
  """

  def __init__(
    self, encoding: frozen_encoders.FrozenEncoders, dtype: str, batch_size: int
  ):
    """Places the parameters and compiles; ConfigError for an uneven batch."""
    # Every process encodes shards of its own, on a mesh of its own.
    self._mesh = sharding.make_mesh(devices=jax.local_devices())
    sharding.check_batch_size(batch_size, self._mesh, '--batch_size')
    self.batch_size = batch_size
    everywhere = sharding.replicated(self._mesh)
    rows = sharding.batch_sharding(self._mesh)
    self._params = jax.device_put(encoding.params, everywhere)
    size = encoding.tokenizer.image_size
    shape = (batch_size, size, size, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    self._resident = sharding.put_batch(noise, self._mesh)

    def encode(params, images):
      return encode_sides(encoding, params, images, dtype)

    self._program = (
      jax.jit(encode, in_shardings=(everywhere, rows), out_shardings=rows)
      .lower(self._params, self._resident)
      .compile()
    )

  def __call__(self, images: UInt8[np.ndarray, 'b h w 3']) -> dict[str, Array]:
    """Starts on a batch; [b, 2, ...] of each field, as it will be stored."""
    return self._program(self._params, sharding.put_batch(images, self._mesh))

  def time(self, count: int) -> float:
    """Seconds for `count` batches that lie on the devices already."""
    began, under_way = time.monotonic(), collections.deque()
    for _ in range(count):
      under_way.append(self._program(self._params, self._resident))
      if len(under_way) > UNDER_WAY:
        jax.block_until_ready(under_way.popleft())
    jax.block_until_ready(list(under_way))
    return time.monotonic() - began


def encode_sides(
  encoding: frozen_encoders.FrozenEncoders,
  params: PyTree,
  images: UInt8[Array, 'b h w 3'],
  dtype: str,
) -> dict[str, Float[Array, 'b 2 ...']]:
  """Encodes images as they are and mirrored, and narrows the results."""
  images = pixels.to_float(images)
  # Side by side, so that both are on the device that has the image.
  sides = jnp.stack([images, images[:, :, ::-1]], axis=1)
  made = encoding(params, sides.reshape(-1, *images.shape[1:]))
  return {
    name: leaf.reshape(-1, token_cache.SIDES, *leaf.shape[1:]).astype(dtype)
    for name, leaf in made.items()
  }
