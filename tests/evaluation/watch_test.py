import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pixels, pretrained
from selfboottok_jax.evaluation import evaluate, frechet, reconstruction, watch
from selfboottok_jax.training import sharding
from tests import tiny

SIZE = tiny.TOKENIZER['image_size']
BATCH = 8


@pytest.fixture(scope='module')
def batches():
  """Originals, reconstructions and mask of 13 images and 3 of padding."""
  rng = np.random.default_rng(0)
  original, made = rng.integers(0, 256, (2, 2, BATCH, SIZE, SIZE, 3), np.uint8)
  mask = (np.arange(2 * BATCH) < 13).reshape(2, BATCH)
  return original, made, mask


def _seen(batches, mesh):
  return [
    reconstruction.Seen(
      *sharding.put_batch((original, made), mesh),
      mask,
      [jnp.asarray(original), jnp.asarray(made)],
    )
    for original, made, mask in zip(*batches, strict=True)
  ]


def _run(observer, seen):
  observer.begin()
  for batch in seen:
    observer.add(batch)
  return dict(observer.finish())


def _on_meshes(make, batches):
  """What is measured on one device and on all of them."""
  found = []
  for devices in (jax.devices()[:1], jax.devices()):
    mesh = sharding.make_mesh(devices=devices)
    found.append(_run(make(mesh), _seen(batches, mesh)))
  one, many = found
  assert one.keys() == many.keys()
  for name, value in one.items():
    np.testing.assert_allclose(many[name], value, rtol=1e-5)
  return many


def test_distance_is_the_mean_without_padding_on_any_mesh(batches):
  distance = pretrained.load_perceptual('hog', patch_size=4)
  found = _on_meshes(lambda mesh: watch.Perceptual(distance, mesh), batches)
  original, made, mask = batches
  measure = jax.jit(distance.__call__)
  values = [
    measure(distance.params, pixels.to_float(a), pixels.to_float(b))[m]
    for a, b, m in zip(original, made, mask, strict=True)
  ]
  expected = np.mean(np.concatenate(values), dtype=np.float64)
  assert found.keys() == {'distance_hog'}
  np.testing.assert_allclose(found['distance_hog'], expected, rtol=1e-5)


def test_frechet_distance_is_that_of_the_features_on_any_mesh(batches):
  network = pretrained.load_network('random', patch_size=8, dim=4)
  found = _on_meshes(lambda mesh: watch.Frechet(network, mesh), batches)
  features = evaluate.image_features(network)
  original, made, mask = batches
  fits = [
    frechet.fit(
      np.asarray(features(x))[m] for x, m in zip(xs, mask, strict=True)
    )
    for xs in (original, made)
  ]
  np.testing.assert_allclose(
    found['fd_random'], frechet.frechet_distance(*fits), rtol=1e-4
  )


def test_another_evaluation_starts_anew(batches):
  mesh = sharding.make_mesh()
  seen = _seen(batches, mesh)
  network = pretrained.load_network('random', patch_size=8, dim=4)
  distance = pretrained.load_perceptual('hog', patch_size=4)
  for observer in (
    watch.Frechet(network, mesh),
    watch.Perceptual(distance, mesh),
    watch.Grid(),
  ):
    first = _run(observer, seen)
    # One that was not finished leaves nothing behind.
    observer.begin()
    observer.add(seen[1])
    again = _run(observer, seen)
    for name, value in first.items():
      np.testing.assert_array_equal(again[name], value)


def test_a_single_image_has_no_frechet_distance(batches):
  mesh = sharding.make_mesh()
  (first, _) = _seen(batches, mesh)
  network = pretrained.load_network('random', patch_size=8, dim=4)
  alone = first._replace(mask=np.arange(BATCH) < 1)
  with pytest.raises(errors.DataError, match='fit of 1 images'):
    _run(watch.Frechet(network, mesh), [alone])


def test_the_grid_has_the_images_of_the_first_batch_without_padding(batches):
  seen = _seen(batches, sharding.make_mesh())
  first, second = (_run(watch.Grid(), [s])[watch.PICTURES] for s in seen)
  assert first.dtype == np.uint8
  # Eight images of a row against five, each as wide.
  assert (first.shape[1] - second.shape[1]) % 3 == 0
  assert first.shape[1] > second.shape[1]
  np.testing.assert_array_equal(_run(watch.Grid(), seen)[watch.PICTURES], first)
  nothing = seen[0]._replace(mask=np.zeros(BATCH, bool))
  grid = _run(watch.Grid(), [nothing, seen[1]])[watch.PICTURES]
  np.testing.assert_array_equal(grid, second)
  assert not _run(watch.Grid(), [nothing])
