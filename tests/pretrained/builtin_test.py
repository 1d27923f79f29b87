import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from selfboottok_jax import errors
from selfboottok_jax.pretrained import builtin, contract


def _waves(angle, size=32, period=8):
  y, x = np.mgrid[:size, :size]
  phase = (x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period
  wave = 0.5 * np.sin(phase)
  return jnp.asarray(np.repeat(wave[None, ..., None], 3, -1), jnp.float32)


def test_orientation_energy_shares_out_the_gradient():
  rng = np.random.default_rng(0)
  luma = jnp.asarray(rng.uniform(-1, 1, (2, 9, 11)), jnp.float32)
  padded = np.pad(luma, ((0, 0), (1, 1), (1, 1)), mode='edge')
  down = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
  right = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
  for bins in (2, 3, 8):
    energy = builtin.orientation_energy(luma, bins)
    assert energy.shape == (2, 9, 11, bins)
    assert float(energy.min()) >= 0
    np.testing.assert_allclose(
      energy.sum(-1), np.hypot(down, right), rtol=2e-3, atol=1e-3
    )


@pytest.mark.parametrize('bin_', range(8))
def test_hog_finds_the_orientation(bin_):
  network = builtin.Hog(patch_size=16, cells=1, bins=8)
  features = network({}, _waves(bin_ * np.pi / 8))
  histograms = features.patches[0, :, :8]
  assert (histograms.argmax(-1) == bin_).all()
  np.testing.assert_allclose(
    jnp.sqrt(jnp.square(histograms).mean(-1)), 1, atol=0.1
  )
  np.testing.assert_allclose(
    features.cls, features.patches.mean(axis=1), rtol=1e-6
  )


def test_hog_of_a_flat_image_is_its_colour():
  colour = jnp.array([-0.5, 0.25, 1.0])
  images = jnp.broadcast_to(colour, (1, 16, 16, 3))
  network = builtin.Hog(patch_size=8, cells=2, bins=4)
  patches = network({}, images).patches
  assert patches.shape == (1, 4, network.dim) == (1, 4, 28)
  cells = patches.reshape(1, 4, 28)
  np.testing.assert_allclose(cells[..., :16].max(), 0, atol=0.02)
  np.testing.assert_allclose(
    cells[..., 16:].reshape(4, 4, 3), np.broadcast_to(colour, (4, 4, 3))
  )


def test_hog_pools_the_cells_of_a_patch():
  """The colours of a patch are those of its own cells, row by row."""
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.uniform(-1, 1, (2, 16, 24, 3)), jnp.float32)
  patches = builtin.Hog(patch_size=8, cells=2, bins=4)({}, images).patches
  colours = patches[..., 16:].reshape(2, 2, 3, 2, 2, 3)
  for row, column, i, j in ((0, 0, 0, 1), (1, 2, 1, 0), (0, 2, 1, 1)):
    y, x = 8 * row + 4 * i, 8 * column + 4 * j
    np.testing.assert_allclose(
      colours[:, row, column, i, j],
      images[:, y : y + 4, x : x + 4].mean(axis=(1, 2)),
      atol=1e-6,
    )


def test_dct_is_the_orthonormal_transform():
  rng = np.random.default_rng(0)
  patch = 4
  images = rng.uniform(-1, 1, (1, patch, patch, 3))
  network = builtin.Dct(patch_size=patch, dim=3 * patch**2)
  latents = network({}, jnp.asarray(images, jnp.float32)).patches[0, 0]
  basis, amplitudes = builtin.dct_basis(patch, network.dim)
  np.testing.assert_allclose(basis.T @ basis, np.eye(48), atol=1e-12)
  coefficients = np.asarray(latents) * amplitudes
  np.testing.assert_allclose(
    basis @ coefficients, images.reshape(-1), atol=1e-5
  )
  grey = scipy.fft.dctn(images[0].sum(-1) / np.sqrt(3), norm='ortho')
  law = builtin.dct_amplitudes(patch)[0]
  for u, v in ((0, 0), (0, 1), (1, 0), (2, 3)):
    wanted = grey[u, v] / law[u, v]
    assert np.abs(latents - wanted).min() < 1e-5, (u, v)
  # The lowest: grey mean, red - blue mean, then the two slowest grey waves.
  np.testing.assert_allclose(latents[0], grey[0, 0] / law[0, 0], rtol=1e-5)
  np.testing.assert_allclose(latents[2], grey[0, 1] / law[0, 1], rtol=1e-4)
  np.testing.assert_allclose(latents[3], grey[1, 0] / law[1, 0], rtol=1e-4)


def test_dct_channels_are_nested_and_of_unit_variance_under_the_law():
  """Noise with the assumed spectrum comes out white, whatever dim."""
  rng = np.random.default_rng(0)
  law = builtin.dct_amplitudes(8)
  coefficients = law * rng.standard_normal((4096, 3, 8, 8))
  opponent = scipy.fft.idctn(coefficients, axes=(2, 3), norm='ortho')
  images = np.einsum('bcpq,ck->bpqk', opponent, builtin._OPPONENT)
  images = jnp.asarray(images, jnp.float32)
  small = builtin.Dct(patch_size=8, dim=12)({}, images).patches[:, 0]
  large = builtin.Dct(patch_size=8, dim=40)({}, images).patches[:, 0]
  np.testing.assert_allclose(small, large[:, :12], atol=1e-4)
  np.testing.assert_allclose(large.std(axis=0), 1, atol=0.06)
  shared = np.cov(np.asarray(large), rowvar=False) - np.eye(40)
  assert np.abs(shared).max() < 0.1


def test_random_is_fixed_by_its_seed():
  first = builtin.init_random(patch_size=8, dim=6)
  again = builtin.init_random(patch_size=8, dim=6)
  other = builtin.init_random(patch_size=8, dim=6, seed=1)
  assert (first.params['kernel'] == again.params['kernel']).all()
  assert (first.params['kernel'] != other.params['kernel']).any()
  images = jnp.asarray(
    np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)), jnp.float32
  )
  doubled = jax.tree.map(lambda x: 2 * x, first.params)
  np.testing.assert_allclose(
    first(doubled, images).patches,
    2 * first(first.params, images).patches,
    rtol=1e-5,
  )


@pytest.mark.parametrize(
  'network',
  [builtin.Hog(8), builtin.Dct(8, 4), builtin.init_random(8, 4)],
  ids=lambda network: network.name,
)
def test_sizes_that_do_not_divide(network):
  assert network.grid(32) == (4, 4)
  assert network.grid((16, 24)) == (2, 3)
  features = network(network.params, jnp.zeros((1, 16, 24, 3)))
  assert features.patches.shape[1] == 6
  with pytest.raises(errors.UserError, match='do not divide'):
    network.grid(30)
  with pytest.raises(errors.UserError, match='32x30 images do not divide'):
    network.grid((32, 30))
  with pytest.raises(errors.UserError, match='24x30 images'):
    network(network.params, jnp.zeros((1, 24, 30, 3)))


def test_distance_is_two_minus_two_cosines():
  network = builtin.init_random(patch_size=8, dim=5)
  measure = builtin.FeatureDistance(network)
  assert measure.params is network.params
  rng = np.random.default_rng(0)
  a, b = (
    jnp.asarray(rng.uniform(-1, 1, (3, 16, 16, 3)), jnp.float32)
    for _ in range(2)
  )
  u, v = (np.asarray(network(network.params, x).patches) for x in (a, b))
  cosine = (u * v).sum(-1) / np.linalg.norm(u, axis=-1)
  cosine /= np.linalg.norm(v, axis=-1)
  np.testing.assert_allclose(
    measure(measure.params, a, b), (2 - 2 * cosine).mean(-1), rtol=1e-4
  )
  np.testing.assert_allclose(
    measure(measure.params, a, -a), 4 * np.ones(3), rtol=1e-4
  )


def test_parameters_are_the_argument_not_the_attribute():
  class Constant:
    name, dim, params = 'constant', 2, {'x': 1.0}

    def grid(self, image_size):
      return 1, 1

    def __call__(self, params, images):
      both = jnp.stack(
        [
          params['x'] * images.mean(axis=(1, 2, 3)),
          1 + 0 * images.mean(axis=(1, 2, 3)),
        ],
        -1,
      )
      return contract.Features(both[:, None])

  measure = builtin.FeatureDistance(Constant())
  a, b = jnp.ones((1, 4, 4, 3)), -jnp.ones((1, 4, 4, 3))
  np.testing.assert_allclose(measure({'x': 1.0}, a, b), [2.0], rtol=1e-5)
  np.testing.assert_allclose(measure({'x': 0.0}, a, b), [0.0])
