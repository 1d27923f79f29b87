"""Small sets of images, and networks for them that compile in no time."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from selfboottok_jax import pixels
from selfboottok_jax.evaluation import set_features
from selfboottok_jax.pretrained import contract, inception
from selfboottok_jax.training import sharding


def images(count: int, seed: int = 0, size: int = 8) -> np.ndarray:
  """Pictures of a colour each, with noise; uint8 [count, size, size, 3]."""
  rng = np.random.default_rng(seed)
  colours = rng.uniform(40, 200, (count, 1, 1, 3))
  noise = 20 * rng.standard_normal((count, size, size, 3))
  return np.clip(colours + noise, 0, 255).astype(np.uint8)


def batches(pictures: np.ndarray, size: int) -> list[dict[str, np.ndarray]]:
  """Batches of one size, the last with padding of noise."""
  padding = -len(pictures) % size
  padded = np.concatenate([pictures, images(padding, 99, pictures.shape[1])])
  mask = np.arange(len(padded)) < len(pictures)
  return [
    {'image': padded[i : i + size], 'mask': mask[i : i + size]}
    for i in range(0, len(padded), size)
  ]


@dataclasses.dataclass(frozen=True, eq=False)
class Colours:
  """Features of an image: the mean colours of its four quarters, and more."""

  name: str = 'colours'
  gain: float = 1.0
  dim: int = 3

  @property
  def params(self):
    return {'gain': np.float32([self.gain])}

  def __call__(self, params, images):
    b, h, w, _ = images.shape
    x = images.reshape(b, 2, h // 2, 2, w // 2, 3).mean(axis=(2, 4))
    x = params['gain'][0] * x
    return contract.Features(x.reshape(b, 4, 3), x.reshape(b, 12))

  def grid(self, image_size):
    return 2, 2


class FakeInception(set_features.SetNetwork):
  """What counts as the official Inception, with features of `Colours`."""

  def features(self, params, images):
    seen = Colours()({'gain': jnp.ones(1)}, images)
    return {
      set_features.POOL: seen.cls,
      set_features.SPATIAL: seen.patches[:, 0] ** 2,
      set_features.LOGITS: 5 * seen.cls,
    }


def fake_inception(resize: str = 'tf1') -> FakeInception:
  network = inception.Inception(resize, params={'x': np.zeros(1, np.float32)})
  return FakeInception(network, is_official=True)


def mesh(count: int = 8):
  """A mesh of so many of the fake devices."""
  import jax

  return sharding.make_mesh(devices=jax.devices()[:count])


def pool(pictures: np.ndarray) -> np.ndarray:
  """Features of `Colours`, computed by numpy."""
  x = pixels.to_float(pictures).astype(np.float64)
  b, h, w, _ = x.shape
  x = x.reshape(b, 2, h // 2, 2, w // 2, 3).mean(axis=(2, 4))
  return x.reshape(b, 12)
