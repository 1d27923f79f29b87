"""Properties of every network and distance in the two dicts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import (
  autoencoders,
  contract,
  convnext,
  dino,
  vision,
)

SIZE = 64
# Networks that are too large to run here: their shapes are looked at.
LARGE = {
  name
  for table in (vision.TEACHERS, autoencoders.AUTOENCODERS)
  for name, variant in table.items()
  if variant.published
} | {'inception', *convnext.NETWORKS}
SMALL = [name for name in pretrained.NETWORKS if name not in LARGE]


def _spec(name):
  """With random weights, where there are weights."""
  choices = {**pretrained.PERCEPTUALS, **pretrained.NETWORKS}
  is_weighted = isinstance(choices[name].build(), contract.Weighted)
  return f'{name}:random' if is_weighted else name


def _images(kind, seed=0):
  if kind == 'noise':
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-1, 1, (2, SIZE, SIZE, 3)), jnp.float32)
  return jnp.full((2, SIZE, SIZE, 3), {'black': -1.0, 'grey': 0.0}[kind])


@pytest.mark.parametrize('name', sorted(LARGE))
def test_large_networks_keep_the_contract_in_shapes(name):
  network = pretrained.load_network(name, abstract=True)
  assert network.name == name
  assert isinstance(network, contract.Weighted)
  assert {type(x) for x in jax.tree.leaves(network.params)} == {
    jax.ShapeDtypeStruct
  }
  features = jax.eval_shape(network, network.params, _images('noise'))
  rows, columns = network.grid(SIZE)
  assert features.patches.shape == (2, rows * columns, network.dim)
  assert features.patches.dtype == jnp.float32


@functools.cache
def _small(name):
  """A network, and its program for two images."""
  network = pretrained.load_network(_spec(name))

  @jax.jit
  def see(params, images):
    return network(params, images)

  return network, see


@pytest.mark.parametrize('name', SMALL)
def test_network_keeps_the_contract(name):
  network, see = _small(name)
  assert network.name == name
  features = see(network.params, _images('noise'))
  rows, columns = network.grid(SIZE)
  assert features.patches.shape == (2, rows * columns, network.dim)
  assert features.patches.dtype == jnp.float32
  assert np.isfinite(features.patches).all()
  assert 0.05 < features.patches.std() < 20
  if features.cls is not None:
    assert features.cls.shape[0] == 2
  # One image does not look at another.
  alone = see(network.params, _images('noise')[::-1])
  np.testing.assert_allclose(
    alone.patches[::-1], features.patches, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('name', SMALL)
def test_patches_are_in_raster_order(name):
  network, see = _small(name)
  rows, columns = network.grid(SIZE)
  row, column = 0, columns - 1  # not on the diagonal: catches a transpose
  side = SIZE // 4
  images = _images('grey')
  images = images.at[1, :side, -side:].set(_images('noise')[0, :side, :side])
  black, dotted = np.asarray(see(network.params, images).patches)
  change = np.abs(dotted - black).sum(axis=-1)
  assert int(change.argmax()) // columns <= row + 1 + rows // 4
  assert int(change.argmax()) % columns >= column - 1 - columns // 4


@pytest.mark.parametrize('kind', ['noise', 'black', 'grey'])
@pytest.mark.parametrize('name', ['hog', 'dct', 'random'])
def test_network_has_finite_gradients(name, kind):
  network = pretrained.load_network(name)

  def energy(x):
    return jnp.square(network(network.params, x).patches).sum()

  gradient = jax.jit(jax.grad(energy))(_images(kind))
  assert np.isfinite(gradient).all()
  assert kind != 'noise' or float(jnp.abs(gradient).max()) > 0


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(
      name,
      marks=pytest.mark.slow if name.startswith('lpips') else (),
    )
    for name in pretrained.PERCEPTUALS
  ],
)
def test_distance_keeps_the_contract(name):
  distance = pretrained.load_perceptual(_spec(name))
  assert distance.name == name
  step = jax.jit(
    jax.value_and_grad(
      lambda b, params, a: (lambda d: (d.sum(), d))(distance(params, a, b)),
      has_aux=True,
    )
  )
  noise, other = _images('noise'), _images('noise', seed=1)
  near = noise + 0.05 * other
  results = {
    key: step(b, distance.params, a)
    for key, (a, b) in {
      'equal': (noise, noise),
      'near': (noise, near),
      'swapped': (near, noise),
      'far': (noise, other),
      'black': (_images('black'), _images('black')),
      'flat': (noise, _images('grey')),
    }.items()
  }
  for key, ((_, value), gradient) in results.items():
    assert value.shape == (2,), key
    assert np.isfinite(value).all(), key
    assert np.isfinite(gradient).all(), key
  values = {key: value for key, ((_, value), _) in results.items()}
  # Jitted, the two sides may differ by the order of a sum.
  assert float(values['equal'].max()) < 1e-12
  assert float(values['black'].max()) < 1e-12
  assert float(values['near'].min()) > 0
  assert (values['far'] > values['near']).all()
  np.testing.assert_allclose(values['near'], values['swapped'], rtol=1e-4)


def _message(load, spec, **options):
  with pytest.raises(errors.UserError) as caught:
    load(spec, **options)
  message = str(caught.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize(
  ('spec', 'options', 'said'),
  [
    ('dinov9', {}, ['dinov9', 'hog', 'mobilenet_v2']),
    ('', {}, ['choose one of']),
    ('hog:/tmp/x.npz', {}, ['takes no source', 'write hog']),
    ('mobilenet_v2', {}, ['mobilenet_v2:FILE', 'mobilenet_v2:random']),
    ('mobilenet_v2:', {}, ['mobilenet_v2:FILE']),
    ('mobilenet_v2:/no/such.npz', {}, ['/no/such.npz', 'no weight file']),
    ('hog', {'patch': 4}, ['no option patch', 'patch_size']),
    ('hog', {'patch_size': 9}, ['patch_size=9', 'cells=2']),
    ('hog', {'bins': 1}, ['bins=1']),
    ('dct', {'patch_size': 2, 'dim': 13}, ['dim=13', '12']),
    ('random', {'dim': 0}, ['dim=0']),
    ('dinov2_s', {'grid': '16'}, ["grid='16'", 'a whole number']),
    ('dinov2_s', {'grid': (4, 2.5)}, ['grid=(4, 2.5)', 'two as 16x24']),
    ('dinov2_s', {'grid': (4, 5, 6)}, ['grid=(4, 5, 6)', 'two as 16x24']),
    ('dinov2_s', {'grid': True}, ['grid=True', 'two as 16x24']),
    ('dinov2_s', {'grid': '4x0'}, ['grid=0', '1 or more']),
    ('dinov2_s', {'patch_size': 1.5}, ['patch_size=1.5', 'a whole number']),
    ('dinov2_s', {'grid': 0}, ['grid=0', '1 or more']),
    ('dinov2_s', {'patch_size': -1}, ['patch_size=-1', '0 or more']),
    ('vavae', {'grid': -3}, ['grid=-3']),
    ('sdvae', {'dtype': 'floaty'}, ['floaty', 'bfloat16']),
  ],
)
def test_load_network_says_what_is_wrong(spec, options, said):
  message = _message(pretrained.load_network, spec, **options)
  for part in said:
    assert part in message


def test_load_perceptual_says_what_is_wrong():
  assert 'dct' in _message(pretrained.load_perceptual, 'dct')
  message = _message(pretrained.load_perceptual, 'lpips_squeeze')
  assert 'lpips_squeeze:FOLDER' in message


def test_trunks_are_named_like_networks():
  trunk = pretrained.load_trunk('dino_tiny:random', dtype='bfloat16')
  assert isinstance(trunk, dino.DinoTrunk)
  assert trunk.vit.dtype == 'bfloat16'
  assert 'dino_s16' in _message(pretrained.load_trunk, 'dinov2_b')
  shapes = pretrained.load_trunk('dino_s16', abstract=True).params
  size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert round(size / 1e6, 1) == dino.TRUNKS['dino_s16'].published.millions


def test_random_weights_are_always_the_same_and_others_are_not():
  one, other = (pretrained.load_network('ijepa_tiny:random') for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_a_transformer_on_its_own():
  network, params = pretrained.load_vit(
    'dinov2_tiny:random', grid=(3, 3), patch_size=8
  )
  assert network.grid == (3, 3)
  assert params['positions'].shape == (1, 9, 48)
  message = _message(pretrained.load_vit, 'hog', grid=(3, 3), patch_size=8)
  assert 'no vision transformer' in message


def test_networks_come_to_the_grid_of_a_rectangle():
  patches = pretrained.Patches((64, 96), 16, dim=8)
  assert patches.grid == (4, 6)
  for name in ('hog', 'dct', 'random', 'mobilenet_v2', 'dinov2_tiny', 'sdvae'):
    network = pretrained.load_network(name, patches=patches, abstract=True)
    assert network.grid((64, 96)) == (4, 6), name
  # In the words of a command line too.
  network = pretrained.load_network('ijepa_tiny', grid='4x6', abstract=True)
  assert network.vit.grid == (4, 6)


def test_networks_are_hashable_and_frozen():
  network = pretrained.load_network('random')
  assert len({network, pretrained.load_network('random')}) == 2
  with pytest.raises(AttributeError):
    network.dim = 3
