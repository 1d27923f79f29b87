import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.pretrained import inception_layers

# Rows of each map, and its channels.
MAPS = {
  'Conv2d_1a_3x3': (149, 32),
  'Conv2d_2a_3x3': (147, 32),
  'Conv2d_2b_3x3': (147, 64),
  'MaxPool_1': (73, 64),
  'Conv2d_3b_1x1': (73, 80),
  'Conv2d_4a_3x3': (71, 192),
  'MaxPool_2': (35, 192),
  'Mixed_5b': (35, 256),
  'Mixed_5c': (35, 288),
  'Mixed_5d': (35, 288),
  'Mixed_6a': (17, 768),
  'Mixed_6b': (17, 768),
  'Mixed_6c': (17, 768),
  'Mixed_6d': (17, 768),
  'Mixed_6e': (17, 768),
  'Mixed_7a': (8, 1280),
  'Mixed_7b': (8, 2048),
  'Mixed_7c': (8, 2048),
}


def _abstract():
  """Parameters without numbers, and an image."""
  params = {
    name: {
      'kernel': jax.ShapeDtypeStruct(shape, jnp.float32),
      'bias': jax.ShapeDtypeStruct(shape[-1:], jnp.float32),
    }
    for name, shape in inception_layers.kernels().items()
  }
  return params, jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)


def _run_all(params, image):
  return dict(inception_layers.run_all(params, image))


def test_the_table_of_kernels():
  kernels = inception_layers.kernels()
  assert len(kernels) == 94
  assert kernels['Mixed_5c.branch_pool'] == (1, 1, 256, 64)
  assert kernels['Mixed_6b.branch7x7dbl_2'] == (7, 1, 128, 128)
  assert kernels['Mixed_7a.branch7x7x3_4'] == (3, 3, 192, 192)
  # Side by side: both read what stands before them.
  for name in ('3x3_2a', '3x3_2b', '3x3dbl_3a', '3x3dbl_3b'):
    assert kernels[f'Mixed_7c.branch{name}'][2:] == (384, 384)


def test_every_map_has_its_size():
  maps = jax.eval_shape(_run_all, *_abstract())
  assert {name: (x.shape[1], x.shape[3]) for name, x in maps.items()} == MAPS


def test_no_product_is_of_reduced_precision():
  jaxpr = jax.make_jaxpr(_run_all)(*_abstract())
  found = [
    equation.params['precision']
    for equation in jaxpr.eqns
    if equation.primitive.name == 'conv_general_dilated'
  ]
  assert len(found) == 94
  assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize('name', ['average', 'maximum'])
def test_a_padded_pool_adds_no_zeros(name):
  # Zeros would pull the border of the average in, and a maximum of negative
  # numbers up.
  x = jnp.full((1, 5, 6, 2), -3.0)
  np.testing.assert_allclose(inception_layers.POOLS[name](x), x, rtol=1e-6)


def test_the_last_block_alone_takes_the_maximum():
  def pools(stage):
    return {
      step
      for branch in inception_layers.STAGES[stage]
      for step in branch
      if isinstance(step, str)
    }

  with_maximum = [s for s in inception_layers.STAGES if 'maximum' in pools(s)]
  assert with_maximum == ['Mixed_7c']
  assert pools('Mixed_7b') == pools('Mixed_6e') == {'average'}
