"""Inception-v3: its resize, its blocks, and the whole network."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.pretrained import inception, weight_reader
from tests.golden import fixtures
from tests.pretrained import weights as weights_lib

pytestmark = pytest.mark.golden


def _prepare(image, resize):
  """uint8 [h, w, c] to what the first layer sees."""
  network = inception.Inception(resize)
  batch = image[None].astype(np.float32) / np.float32(127.5) - 1
  return np.asarray(jax.jit(network.prepare)(batch)[0])


def test_resize_of_torch_fidelity_and_pytorch_fid():
  recorded = fixtures.load('generator', 'inception_resize')
  check = functools.partial(fixtures.check, recorded.name)
  arrays = recorded.arrays
  for index in range(len(recorded.meta['sizes'])):
    image = arrays[f'in.img{index}']
    normalised = _prepare(image, 'tf1')
    pixels = normalised * 128 + 128
    actual = {
      f'out.resized{index}': pixels,
      f'out.resized{index}_sub3': pixels[::3, ::3],
      f'out.resized{index}_sub': pixels[::7, ::5],
      f'out.normalised{index}_sub': normalised[::13, ::11],
      f'out.pytorchfid{index}_sub': _prepare(image, 'half_pixel')[::13, ::11],
      f'out.sum{index}': pixels.sum(axis=(0, 1), dtype=np.float64),
    }
    for key in actual.keys() & arrays.keys():
      check(key, actual.pop(key), arrays.pop(key))
  assert {key[:3] for key in arrays} == {'in.'}


def test_resize_of_tensorflow():
  recorded = fixtures.load('generator', 'adm_resize')
  arrays = recorded.arrays
  for index in range(len(recorded.meta['sizes'])):
    pixels = _prepare(arrays[f'in.img{index}'], 'tf1') * 128 + 128
    for key, value in (
      (f'out.resized{index}_sub', pixels[::7, ::5]),
      (f'out.sum{index}', pixels.sum(axis=(0, 1), dtype=np.float64)),
      (f'out.last_rows_cols{index}', pixels[-3:, -3:]),
    ):
      fixtures.check(recorded.name, key, value, arrays[key])


# Recorded block to the stage of that kind, for any number of channels.
BLOCKS = {
  'A': 'Mixed_5b',
  'B': 'Mixed_6a',
  'C': 'Mixed_6b',
  'D': 'Mixed_7a',
  'E1': 'Mixed_7b',
}


def _block_weights(recorded, block, prefix):
  """Folded layers of a recorded block, under a stage's name."""
  path = fixtures.path('generator', recorded.name)
  path = path.with_name(recorded.meta['weights_files'][block])
  if not path.exists():
    assert 'GOLDEN' not in os.environ, f'no {path.name} in GOLDEN'
    pytest.skip(f'no {path.name} beside {recorded.name}')
  with np.load(path) as file:
    arrays = {prefix + name: file[name] for name in file.files}
  layers = {n.removesuffix('.conv.weight') for n in arrays if '.conv.' in n}
  reader = weight_reader.Reader(arrays)
  shapes = {
    n: arrays[f'{n}.conv.weight'].transpose(2, 3, 1, 0).shape for n in layers
  }
  return {n: inception.fold(reader, n, shape) for n, shape in shapes.items()}


def _first(array):
  return np.moveaxis(np.asarray(array), -1, 1)


def _last(array):
  return jnp.moveaxis(array, 1, -1)


def test_blocks_and_their_pools():
  recorded = fixtures.load('generator', 'inception_blocks')
  arrays = recorded.arrays
  actual = {}
  for block, stage in BLOCKS.items():
    params = _block_weights(recorded, block, f'{stage}.')
    x = _last(arrays[f'in.x_{block}'])
    actual[f'out.{block}'] = inception.run_stage(params, stage, x)
  params = {
    name.replace('Mixed_7b', 'Mixed_7c'): layer
    for name, layer in params.items()
  }
  other = inception.run_stage(params, 'Mixed_7c', x)
  np.testing.assert_array_equal(other[..., :-192], actual['out.E1'][..., :-192])
  actual['out.E2_pool_branch'] = other[..., -192:]
  pools = inception.POOLS
  actual['out.maxpool_pad'] = pools['maximum'](x)
  actual['out.avgpool_exclude_pad'] = pools['average'](_last(arrays['in.x_A']))
  for key, value in actual.items():
    fixtures.check(recorded.name, key, _first(value), arrays[key])
  torchvision = arrays['out.E_plain_torchvision_pool_branch']
  for mine in (actual['out.E1'], other):
    assert np.abs(_first(mine[..., -192:]) - torchvision).max() > 1


def test_stem():
  recorded = fixtures.load('generator', 'inception_blocks')
  params = _block_weights(recorded, 'stem', '')
  x = _last(recorded.arrays['in.x_stem'])
  for stage in list(inception.STAGES)[:7]:
    x = inception.run_stage(params, stage, x)
    stem = 'out.stem.' + stage.replace('MaxPool_', 'pool')
    (key,) = {stem, f'{stem}_first16'} & recorded.arrays.keys()
    expected = recorded.arrays[key]
    images, channels = expected.shape[:2]
    fixtures.check(recorded.name, key, _first(x)[:images, :channels], expected)


# End of a name to its numbers, from uniform ones of [0, 1).
RECIPE = {
  'conv.weight': lambda u, fan_in: (2 * u - 1) * np.sqrt(6 / fan_in),
  'bn.weight': lambda u, _: 0.8 + 0.4 * u,
  'bn.bias': lambda u, _: 0.4 * u - 0.2,
  'bn.running_mean': lambda u, _: 0.4 * u - 0.2,
  'bn.running_var': lambda u, _: 0.6 + 0.8 * u,
  'fc.weight': lambda u, _: (2 * u - 1) * 0.06,
  'fc.bias': lambda u, _: u - 0.5,
}


def _uniform(start, count):
  """64-bit integers that wrap around, mixed; the upper 24 bits of each."""
  z = np.arange(1, 1 + count, dtype=np.uint64) + np.uint64(start)
  z *= np.uint64(0x9E3779B97F4A7C15)
  for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
    z ^= z >> np.uint64(shift)
    z *= np.uint64(factor)
  z ^= z >> np.uint64(31)
  return (z >> np.uint64(40)).astype(np.float64) / 2**24


def _recipe(seed):
  """The fixture's state dict, which its description defines by a formula."""
  arrays = {}
  for number, (name, shape) in enumerate(
    sorted(weights_lib.wanted(inception.assemble).items())
  ):
    start = seed * 0x9E3779B97F4A7C15 + number * 0xD1B54A32D192ED03
    u = _uniform(start % 2**64, int(np.prod(shape)))
    end = '.'.join(name.split('.')[-2:])
    numbers = RECIPE[end](u, np.prod(shape[1:]))
    arrays[name] = numbers.astype(np.float32).reshape(shape)
  return arrays


@pytest.fixture(scope='module')
def full():
  """The recorded run and the folded parameters of its weights."""
  recorded = fixtures.load('generator', 'inception_full')
  weights = _recipe(recorded.meta['recipe_seed'])
  names = sorted(weights)
  assert names == list(recorded.arrays['out.check_names'])
  for key, value in {
    'out.check_first3': [weights[name].ravel()[:3] for name in names],
    'out.check_sum': [weights[name].sum(dtype=np.float64) for name in names],
  }.items():
    fixtures.check(recorded.name, key, value, recorded.arrays[key])
  return recorded, inception.Inception().read(weights, 'test')


def _measure(full, batch, resize):
  recorded, params = full
  network = inception.Inception(resize)
  images = recorded.arrays[f'in.{batch}'].astype(np.float32)
  images = images / np.float32(127.5) - 1
  return jax.jit(network.measure)(params, images)


@pytest.mark.parametrize('batch', ['img64', 'img256'])
def test_whole_network(full, batch):
  recorded, _ = full
  measured = _measure(full, batch, 'tf1')
  actual = {f'{width}': x for width, x in measured.pooled.items()} | {
    'spatial2023': measured.spatial,
    'logits_unbiased': measured.logits_unbiased,
    'logits': measured.logits,
    'softmax_nobias': jax.nn.softmax(measured.logits_unbiased),
  }
  actual = {f'out.{batch}.{key}': x for key, x in actual.items()} | {
    f'dbg.{batch}.mean.{stage}': x[..., :16].mean(axis=(1, 2))
    for stage, x in measured.activations.items()
  }
  recorded_keys = {
    key
    for key in recorded.arrays
    if batch in key and not key.startswith('in.') and 'pytorchfid' not in key
  }
  assert recorded_keys == actual.keys()
  for key, value in actual.items():
    fixtures.check(recorded.name, key, value, recorded.arrays[key])


@pytest.mark.parametrize('batch', ['img64', 'img256'])
def test_whole_network_behind_the_other_resize(full, batch):
  recorded, _ = full
  pooled = _measure(full, batch, 'half_pixel').pooled
  for index, width in enumerate(inception.POOLED_AFTER):
    key = f'out.{batch}.pytorchfid_block{index}'
    fixtures.check(recorded.name, key, pooled[width], recorded.arrays[key])
