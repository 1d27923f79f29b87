import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import lpips
from tests.pretrained import weights

# Strides of the tapped activations, as torchvision's sizes have them.
SIDES = {
  'squeeze': (31, 15, 7, 3, 3, 3, 3),
  'vgg': (64, 32, 16, 8, 4),
  'alex': (15, 7, 3, 3, 3),
}
MILLIONS = {'squeeze': 0.72, 'vgg': 14.7, 'alex': 2.47}


@pytest.mark.parametrize('name', lpips.BACKBONES)
def test_sizes_of_the_whole_network(name):
  backbone = lpips.BACKBONES[name]()
  shapes = weights.wanted(lpips.assemble, backbone)
  kernels = {k: v for k, v in shapes.items() if not k.startswith('lpips.')}
  count = sum(np.prod(shape) for shape in kernels.values()) / 1e6
  assert count == pytest.approx(MILLIONS[name], rel=0.01)
  params = {
    key: jax.ShapeDtypeStruct(
      shape if len(shape) == 1 else (*shape[2:], shape[1], shape[0]),
      jnp.float32,
    )
    for key, shape in shapes.items()
  }
  least = backbone.min_image_size
  for size in (64, least):
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    taps = jax.eval_shape(backbone.taps, params, image)
    assert [tap.shape[-1] for tap in taps] == list(backbone.widths)
    sides = tuple(tap.shape[1] for tap in taps)
    assert sides == SIDES[name] if size == 64 else min(sides) >= 1


@pytest.mark.slow
def test_a_distance_of_each_backbone_is_zero_at_equality(tmp_path):
  rng = np.random.default_rng(0)
  a, b = (
    jnp.asarray(rng.uniform(-1, 1, (1, 48, 48, 3)), jnp.float32)
    for _ in range(2)
  )
  for name, backbone in lpips.BACKBONES.items():
    arrays = weights.random_lpips(weights.wanted(lpips.assemble, backbone()))
    # Layers behind the last tap may be in the file.
    arrays |= {unused: np.zeros(1) for unused in backbone().unused}
    path = weights.save(tmp_path / f'{name}.npz', arrays)
    network = pretrained.load_perceptual(f'lpips_{name}:{path}')
    assert network.name == f'lpips_{name}'
    assert float(network(network.params, a, a)[0]) == 0
    assert float(network(network.params, a, b)[0]) > 0


FILE = 'lpips_squeeze_v0.1_torchvision_squeezenet1_1_fp16.npz'


def _squeeze(path):
  return pretrained.load_perceptual(f'lpips_squeeze:{path}')


@pytest.fixture(scope='module')
def network(tmp_path_factory):
  path = tmp_path_factory.mktemp('lpips') / 'lpips.npz'
  return _squeeze(
    weights.save(
      path,
      weights.random_lpips(weights.wanted(lpips.assemble, lpips.squeeze())),
    )
  )


def _noise(size, seed=0, batch=1):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.uniform(-1, 1, (batch, size, size, 3)), jnp.float32)


def test_float16_becomes_float32_and_oihw_becomes_hwio(tmp_path):
  arrays = weights.random_lpips(weights.wanted(lpips.assemble, lpips.squeeze()))
  network = _squeeze(weights.save(tmp_path / 'a.npz', arrays))
  kernel = network.params['features.6.expand3x3.weight']
  assert {x.dtype for x in jax.tree.leaves(network.params)} == {
    jnp.dtype(jnp.float32)
  }
  stored = arrays['features.6.expand3x3.weight']
  assert kernel[0, 2, 5, 7] == np.float32(stored[7, 5, 0, 2])


@pytest.mark.parametrize('name', lpips.BACKBONES)
def test_every_form_of_a_file_gives_the_same(tmp_path, name):
  backbone = lpips.BACKBONES[name]()
  arrays = weights.random_lpips(weights.wanted(lpips.assemble, backbone))
  path = weights.save(tmp_path / 'ours.npz', arrays)
  ours = pretrained.load_perceptual(f'lpips_{name}:{path}')
  package = weights.as_package(arrays)
  whole = weights.save(tmp_path / 'package.npz', package)
  parts = weights.as_published(arrays, backbone.unused)
  two = ','.join(
    weights.save(tmp_path / f'{i}.npz', part) for i, part in enumerate(parts)
  )
  folder = tmp_path / 'folder'
  folder.mkdir()
  for file, part in zip(lpips.PUBLISHED[name].files, parts, strict=True):
    # The contents decide about the kind of a file, not its name.
    pathlib.Path(weights.save(tmp_path / 'p.npz', part)).rename(folder / file)
  for source in (whole, two, str(folder)):
    theirs = pretrained.load_perceptual(f'lpips_{name}:{source}')
    assert theirs.params.keys() == ours.params.keys()
    for key, array in ours.params.items():
      np.testing.assert_array_equal(theirs.params[key], array)
  taken = weights.lpips_of(package, backbone, name)
  assert taken.params.keys() == ours.params.keys()


def test_what_is_missing_is_said_in_the_names_of_our_files(tmp_path):
  backbone = lpips.squeeze()
  arrays = weights.random_lpips(weights.wanted(lpips.assemble, backbone))
  package = weights.as_package(arrays)
  del package['lin3.model.1.weight']
  package['lin4.model.1.weight'] = np.ones((1, 7, 1, 1))
  path = weights.save(tmp_path / 'a.npz', package)
  with pytest.raises(errors.WeightsError) as caught:
    _squeeze(path)
  message = str(caught.value)
  assert '1 missing: lpips.lin3' in message
  assert '1 mis-shaped: lpips.lin4 is (7,), wanted (384,)' in message
  body, _ = weights.as_published(arrays, backbone.unused)
  with pytest.raises(errors.WeightsError, match='7 missing: lpips.lin0;'):
    _squeeze(weights.save(tmp_path / 'body.npz', body))


def test_without_a_source_it_says_which_two_files_to_fetch():
  for name in lpips.BACKBONES:
    with pytest.raises(errors.WeightsError, match=r'\.pth and .*\.pth, which'):
      pretrained.load_perceptual(f'lpips_{name}')


@pytest.mark.parametrize('size', [3, 4, 5, 6, 7, 8, 9])
def test_max_pool_lets_the_last_window_overhang(size):
  x = -1 - _noise(size)  # negative: padding with zeros would show
  pooled = lpips.max_pool(x)
  starts = range(0, size - 1, 2)  # ceil((size - 3) / 2) + 1 of them
  wanted = jnp.stack(
    [
      jnp.stack([x[:, i : i + 3, j : j + 3].max((1, 2)) for j in starts], 1)
      for i in starts
    ],
    axis=1,
  )
  np.testing.assert_array_equal(pooled, wanted)


@pytest.mark.parametrize('size', [32, 39])
def test_any_size_from_32_up(network, size):
  shares = jax.jit(network.per_layer)(
    network.params, _noise(size), _noise(size, 1)
  )
  assert shares.shape == (1, 7)
  assert np.isfinite(shares).all()
  assert float(shares.min()) > 0


def test_smaller_images_are_refused(network):
  with pytest.raises(errors.UserError, match='31x31 images'):
    network(network.params, _noise(31), _noise(31))


def test_gradient_is_finite_where_all_features_are_zero(network):
  """Biases of -100 switch every ReLU off."""
  dead = {
    k: jnp.full_like(v, -100) if k.endswith('bias') else v
    for k, v in network.params.items()
  }
  step = jax.jit(
    jax.value_and_grad(lambda b, params, a: network(params, a, b).sum())
  )
  for params in (dead, network.params):
    value, gradient = step(_noise(32), params, _noise(32, 1))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
  assert float(jnp.abs(gradient).max()) > 0

  def length(x):
    return jnp.square(lpips._unit(x)).sum()

  features = jnp.zeros((1, 2, 1, 4)).at[0, 1].set(3.0)
  np.testing.assert_array_equal(lpips._unit(features)[0, 1], 0.5)
  assert np.isfinite(jax.grad(length)(features)).all()


def test_float64_stays_float64_and_bfloat16_becomes_float32(network):
  def dtype(kind):
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), kind)
    return jax.eval_shape(
      lambda a, b: network(network.params, a, b), x, x
    ).dtype

  assert dtype(jnp.bfloat16) == dtype(jnp.float32) == jnp.float32
  with jax.enable_x64(True):
    assert dtype(jnp.float64) == jnp.float64


def test_real_weights_mind_a_shift_less_than_noise():
  """The distance tells images apart that have the same squared error."""
  network = _squeeze(weights.real(FILE))
  y, x = np.mgrid[:64, :64]
  base = np.stack([np.sin(x / 1.5), np.sin(y / 1.3), np.sin((x + y) / 2)], -1)
  base = jnp.asarray(0.6 * base[None], jnp.float32)
  moved = jnp.roll(base, 1, axis=2)
  error = jnp.sqrt(jnp.square(moved - base).mean())
  noisy = base + error * jax.random.normal(jax.random.key(0), base.shape)
  distance = jax.jit(network)(
    network.params,
    jnp.concatenate([base, base, base]),
    jnp.concatenate([base, moved, noisy]),
  )
  assert float(distance[0]) < 1e-12
  assert 0.01 < float(distance[1]) < 0.5 * float(distance[2])


def test_known_value_of_torchmetrics():
  """Its documented example for 'squeeze' is 0.1008: two uniform batches.

  Its torch.rand of seed 123 takes the low 24 bits of the Mersenne twister,
  which numpy's legacy generator is, seeded alike.
  """
  network = _squeeze(weights.real(FILE))
  twister = np.random.RandomState(123)  # noqa: NPY002
  bits = twister.randint(0, 2**32, (2, 10, 3, 100, 100), dtype=np.uint32)
  images = (bits & 0xFFFFFF).astype(np.float32) / 2**24 * 2 - 1
  a, b = jnp.asarray(images.transpose(0, 1, 3, 4, 2))
  value = jax.jit(network)(network.params, a, b).mean()
  np.testing.assert_allclose(value, 0.1008, atol=5e-5)
