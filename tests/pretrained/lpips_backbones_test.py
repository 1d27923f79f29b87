import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import pretrained
from selfboottok_jax.pretrained import lpips, lpips_backbones
from tests.pretrained import weights

# Strides of the tapped activations, as torchvision's sizes have them.
SIDES = {
  'squeeze': (31, 15, 7, 3, 3, 3, 3),
  'vgg': (64, 32, 16, 8, 4),
  'alex': (15, 7, 3, 3, 3),
}
MILLIONS = {'squeeze': 0.72, 'vgg': 14.7, 'alex': 2.47}


@pytest.mark.parametrize('name', lpips_backbones.BACKBONES)
def test_sizes_of_the_whole_network(name):
  backbone = lpips_backbones.BACKBONES[name]()
  shapes = lpips.shapes(backbone)
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


def test_a_distance_of_each_backbone_is_zero_at_equality(tmp_path):
  rng = np.random.default_rng(0)
  a, b = (
    jnp.asarray(rng.uniform(-1, 1, (1, 48, 48, 3)), jnp.float32)
    for _ in range(2)
  )
  for name, backbone in lpips_backbones.BACKBONES.items():
    arrays = weights.random_lpips(lpips.shapes(backbone()))
    # What lies behind the last tap may be in the file.
    arrays |= {unused: np.zeros(1) for unused in backbone().unused}
    path = weights.save(tmp_path / f'{name}.npz', arrays)
    network = pretrained.load_perceptual(f'lpips_{name}:{path}')
    assert network.name == f'lpips_{name}'
    assert float(network(network.params, a, a)[0]) == 0
    assert float(network(network.params, a, b)[0]) > 0
