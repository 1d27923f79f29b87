import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import vit

FIELDS = {'grid': (2, 3), 'patch_size': 4, 'width': 16, 'depth': 3}
MORE = {'heads': 2, 'hidden': 32}
IMAGES = jax.random.uniform(jax.random.key(0), (2, 8, 12, 3), minval=-1)


def _run(**fields):
  network = vit.Vit(**FIELDS | MORE | fields)
  params = jax.jit(network.init)(jax.random.key(1), IMAGES)
  return network.apply(params, IMAGES), params


def test_taps_are_the_tokens_between_blocks():
  output, params = _run(taps=(0, 2, 3), registers=2)
  assert set(params['params']) >= {'blocks_0', 'blocks_2'}
  assert list(output.hidden) == [0, 2, 3]
  for hidden in output.hidden.values():
    assert hidden.shape == (2, 1 + 2 + 6, 16)
  normed = (output.hidden[3] - output.hidden[3].mean(-1, keepdims=True)) / (
    output.hidden[3].std(-1, keepdims=True)
  )
  np.testing.assert_allclose(output.patches, normed[:, 3:], atol=1e-3)
  np.testing.assert_allclose(output.summary, normed[:, 0], atol=1e-3)


@pytest.mark.parametrize(
  ('fields', 'has_summary'),
  [({}, True), ({'cls': False}, False), ({'cls': False, 'pool': True}, True)],
)
def test_summary_is_there_where_something_makes_it(fields, has_summary):
  output, _ = _run(**fields)
  assert output.patches.shape == (2, 6, 16)
  assert (output.summary is not None) == has_summary


def test_images_of_another_size_are_refused():
  network = vit.Vit(**FIELDS | MORE)
  with pytest.raises(ValueError, match='wanted a grid of 2 x 3'):
    network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_bfloat16_computes_nearby_and_returns_float32():
  full, params = _run()
  half = vit.Vit(**FIELDS | MORE, dtype='bfloat16').apply(params, IMAGES)
  assert half.patches.dtype == half.summary.dtype == jnp.float32
  np.testing.assert_allclose(half.patches, full.patches, atol=0.1)


NETWORK = vit.Vit((2, 2), 4, 16, 3, 2, 32, layer_scale=True, taps=(1,))


def _timm(seed=0):
  """A state dict of NETWORK in timm's names."""
  rng = np.random.default_rng(seed)
  shapes = {
    'patch_embed.proj.weight': (16, 3, 4, 4),
    'patch_embed.proj.bias': (16,),
    'pos_embed': (1, 5, 16),
    'cls_token': (1, 1, 16),
    'norm.weight': (16,),
    'norm.bias': (16,),
  }
  for i in range(3):
    inside = {
      'attn.qkv': (48, 16), 'attn.proj': (16, 16), 'mlp.fc1': (32, 16),
      'mlp.fc2': (16, 32), 'norm1': (16,), 'norm2': (16,),
    }  # fmt: skip
    for name, shape in inside.items():
      shapes[f'blocks.{i}.{name}.weight'] = shape
      shapes[f'blocks.{i}.{name}.bias'] = shape[:1]
    for gain in ('ls1', 'ls2'):
      shapes[f'blocks.{i}.{gain}.gamma'] = (16,)
  return {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def test_parameters_are_those_that_the_network_wants():
  params = vit.read(_timm(), NETWORK, vit.NAMINGS['timm'], 'test')
  images = jnp.zeros((1, 8, 8, 3))
  wanted = jax.eval_shape(NETWORK.init, jax.random.key(0), images)['params']
  assert jax.tree.structure(params) == jax.tree.structure(wanted)
  assert jax.tree.map(np.shape, params) == jax.tree.map(
    lambda leaf: leaf.shape, wanted
  )


def test_all_that_does_not_fit_is_in_one_error():
  arrays = _timm()
  del arrays['blocks.2.mlp.fc1.bias']
  arrays['norm.weight'] = np.zeros(17, np.float32)
  arrays['head.weight'] = np.zeros(3, np.float32)
  arrays['cls_token'] = np.full((1, 1, 16), np.nan, np.float32)
  with pytest.raises(errors.WeightsError) as caught:
    vit.read(arrays, NETWORK, vit.NAMINGS['timm'], 'some.safetensors')
  for words in (
    'some.safetensors',
    'missing: blocks.2.mlp.fc1.bias',
    'unexpected: head.weight',
    'norm.weight is (17,), wanted (16,)',
    'not finite numbers: cls_token',
  ):
    assert words in str(caught.value)


def test_what_serves_training_alone_may_be_there():
  arrays = _timm() | {'mask_token': np.zeros((1, 16), np.float32)}
  vit.read(arrays, NETWORK, vit.NAMINGS['timm'], 'test')
