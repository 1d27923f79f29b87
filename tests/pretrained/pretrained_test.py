"""What holds for every network and distance in the two dicts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import lpips, lpips_backbones, mobilenet
from tests.pretrained import weights

SIZE = 64


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp('weights')
  return {
    **{
      f'lpips_{name}': weights.save(
        folder / f'{name}.npz', weights.random_lpips(lpips.shapes(backbone()))
      )
      for name, backbone in lpips_backbones.BACKBONES.items()
    },
    'mobilenet_v2': weights.save(
      folder / 'mobilenet.npz', weights.random_mobilenet(mobilenet.shapes())
    ),
  }


def _spec(name, files):
  return f'{name}:{files[name]}' if name in files else name


def _images(kind, seed=0):
  if kind == 'noise':
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-1, 1, (2, SIZE, SIZE, 3)), jnp.float32)
  return jnp.full((2, SIZE, SIZE, 3), {'black': -1.0, 'grey': 0.0}[kind])


@pytest.mark.parametrize('name', pretrained.NETWORKS)
def test_network_keeps_the_contract(name, files):
  network = pretrained.load_network(_spec(name, files))
  assert network.name == name

  @jax.jit
  def see(params, images):
    return network(params, images)

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


@pytest.mark.parametrize('name', pretrained.NETWORKS)
def test_patches_are_in_raster_order(name, files):
  network = pretrained.load_network(_spec(name, files))
  rows, columns = network.grid(SIZE)
  row, column = 0, columns - 1  # not on the diagonal: catches a transpose
  side = SIZE // 4
  black = _images('grey')[:1]
  dotted = black.at[:, :side, -side:].set(_images('noise')[:1, :side, :side])
  see = jax.jit(lambda x: network(network.params, x).patches)
  change = jnp.abs(see(dotted) - see(black)).sum(axis=-1)[0]
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


@pytest.mark.parametrize('name', pretrained.PERCEPTUALS)
def test_distance_keeps_the_contract(name, files):
  distance = pretrained.load_perceptual(_spec(name, files))
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
    ('hog:/tmp/x.npz', {}, ['takes no path', 'write hog']),
    ('mobilenet_v2', {}, ['mobilenet_v2:PATH']),
    ('mobilenet_v2:', {}, ['mobilenet_v2:PATH']),
    ('mobilenet_v2:/no/such.npz', {}, ['/no/such.npz', 'no weight file']),
    ('hog', {'patch': 4}, ['no option patch', 'patch_size']),
    ('hog', {'patch_size': 9}, ['patch_size=9', 'cells=2']),
    ('hog', {'bins': 1}, ['bins=1']),
    ('dct', {'patch_size': 2, 'dim': 13}, ['dim=13', '12']),
    ('random', {'dim': 0}, ['dim=0']),
  ],
)
def test_load_network_says_what_is_wrong(spec, options, said):
  message = _message(pretrained.load_network, spec, **options)
  for part in said:
    assert part in message


def test_load_perceptual_says_what_is_wrong():
  assert 'dct' in _message(pretrained.load_perceptual, 'dct')
  assert 'lpips_squeeze:PATH' in _message(
    pretrained.load_perceptual, 'lpips_squeeze'
  )


def test_networks_are_hashable_and_frozen():
  network = pretrained.load_network('random')
  assert len({network, pretrained.load_network('random')}) == 2
  with pytest.raises(AttributeError):
    network.dim = 3
