import os
import pathlib
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from selfboottok_jax import pretrained
from selfboottok_jax.pretrained import mobilenet
from tests.pretrained import weights

# Of imagenette's classes by name, among the 1001.
LABELS = (1, 218, 483, 492, 498, 567, 570, 572, 575, 702)
FILE = 'mobilenet_v2_1.0_224_int8w.npz'


@pytest.fixture(scope='module')
def network(tmp_path_factory):
  path = tmp_path_factory.mktemp('mobilenet') / 'mobilenet.npz'
  arrays = weights.random_mobilenet(weights.wanted(mobilenet.assemble))
  spec = f'mobilenet_v2:{weights.save(path, arrays)}'
  return pretrained.load_network(spec, image_size=0)


def test_the_table_of_layers():
  shapes = weights.wanted(mobilenet.assemble)
  kernels = {k: v for k, v in shapes.items() if k.endswith('_w_int8')}
  assert len(kernels) == 53
  assert [k[:2] for k in kernels] == [f'{i:02d}' for i in range(53)]
  assert kernels['39_conv_w_int8'] == (1, 1, 96, 576)
  assert kernels['52_conv_w_int8'] == (1, 1, 1280, 1001)
  strides = [s.stride for _, block in mobilenet.BLOCKS for s in block]
  assert np.prod(strides) * mobilenet.STEM.stride == 32
  assert sum(np.prod(v) for v in kernels.values()) == 3_471_040


def test_kernels_are_dequantised_per_output_channel(tmp_path):
  arrays = weights.random_mobilenet(weights.wanted(mobilenet.assemble))
  arrays['00_conv_scale'] = np.arange(1, 33, dtype=np.float32)
  arrays['01_dw_scale'] = np.arange(1, 33, dtype=np.float32)
  params = mobilenet.MobileNetV2().read(arrays, 'test')
  for name in ('00_conv', '01_dw'):
    kernel = params[name]['kernel']
    assert kernel.dtype == jnp.float32
    np.testing.assert_array_equal(
      kernel[1, 2, 0, 5], 6.0 * arrays[f'{name}_w_int8'][1, 2, 0, 5]
    )


@pytest.mark.parametrize('size', [64, 50])
def test_native_size(network, size):
  rng = np.random.default_rng(0)
  images = jnp.asarray(rng.uniform(-1, 1, (2, size, size, 3)), jnp.float32)
  features = jax.jit(network)(network.params, images)
  assert network.grid(size) == (4, 4)
  assert features.patches.shape == (2, 16, 96)
  assert features.cls.shape == (2, 1280)
  assert 0 <= float(features.cls.min()) <= float(features.cls.max()) <= 6


def test_rectangles_keep_their_aspect_where_that_is_asked_for():
  network = mobilenet.MobileNetV2(image_size=(48, 80))
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((2, 24, 40, 3), jnp.float32)
  see = jax.eval_shape(network, shapes, images)
  assert see.patches.shape == (2, 15, 96)
  assert network.grid((24, 40)) == (3, 5)
  plain = mobilenet.MobileNetV2(image_size=0)
  assert plain.grid((24, 40)) == (2, 3)


def test_resizes_to_224_unless_told():
  resized = mobilenet.MobileNetV2(params={})
  assert resized.grid(64) == resized.grid(256) == (14, 14)


def test_real_weights_recognise_photographs():
  """Most of 40 photographs of 10 ImageNet classes, at 64 pixels."""
  network = pretrained.load_network(f'mobilenet_v2:{weights.real(FILE)}')
  folder = pathlib.Path(os.environ.get('DATA') or weights.SHARED / 'data')
  path = folder / 'imagenette64.tar'
  if not path.exists():
    assert 'DATA' not in os.environ, f'no imagenette64.tar in DATA={folder}'
    pytest.skip(f'no imagenette64.tar in {folder}; set DATA to its folder')
  images, labels = [], []
  with tarfile.open(path) as tar:
    names = sorted(n for n in tar.getnames() if '/val/' in n and '.jpg' in n)
    classes = sorted({name.split('/')[-2] for name in names})
    for name in names[:: len(names) // 40]:
      image = PIL.Image.open(tar.extractfile(name)).convert('RGB')
      images.append(np.asarray(image) / 127.5 - 1)
      labels.append(LABELS[classes.index(name.split('/')[-2])])
  images = jnp.asarray(np.stack(images), jnp.float32)
  pooled = jax.jit(network)(network.params, images).cls
  head = network.params[mobilenet.CLASSIFIER.name]
  logits = pooled @ head['kernel'][0, 0] + head['bias'][None]
  assert logits.shape == (len(labels), mobilenet.CLASSES)
  assert (logits.argmax(-1) == np.array(labels)).mean() > 0.3
