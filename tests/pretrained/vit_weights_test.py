import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import vit, vit_weights

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
  params = vit_weights.read(_timm(), NETWORK, 'timm', 'test')
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
    vit_weights.read(arrays, NETWORK, 'timm', 'some.safetensors')
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
  vit_weights.read(arrays, NETWORK, 'timm', 'test')
