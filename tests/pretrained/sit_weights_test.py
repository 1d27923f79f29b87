import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import layers, sit, transformer
from selfboottok_jax.pretrained import released_generators, sit_weights
from tests.inference import released_sits


def _model(arrays, family, **changes):
  fields = released_generators.fields(
    arrays, family, 'test', heads=released_sits.HEADS
  )
  return sit.SiT(**{**fields, 'align_depth': 2, **changes})


def _read(family, **options):
  arrays = released_sits.state_dict(family, **options)
  model = _model(arrays, family)
  return arrays, model, sit_weights.read(arrays, model, family, 'test')


@pytest.mark.parametrize('family', list(sit_weights.FAMILIES))
def test_parameters_are_those_of_the_module(family):
  _, model, params = _read(family)
  x = jnp.zeros((1, model.num_tokens, model.token_dim))
  cls = jnp.zeros((1, model.cls_dim)) if model.cls_dim else None
  wanted = jax.eval_shape(
    model.init, jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, int), cls
  )['params']
  assert jax.tree.map(np.shape, params) == jax.tree.map(
    lambda leaf: leaf.shape, dict(wanted)
  )
  leaves = jax.tree.leaves(params)
  assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_time_is_reversed_exactly():
  t, kernel = np.linspace(0, 1, 7), np.random.default_rng(0).normal(size=(8, 3))
  with jax.enable_x64(True):
    seen, reversed_ = (
      np.asarray(layers.timestep_features(jnp.asarray(a), 8))
      for a in (t, 1 - t)
    )
    turned = np.asarray(sit_weights.reverse_time(kernel))
    again = np.asarray(sit_weights.reverse_time(turned))
  np.testing.assert_allclose(seen @ turned, reversed_ @ kernel, atol=1e-14)
  np.testing.assert_allclose(again, kernel, atol=1e-14)


@pytest.mark.parametrize(
  ('family', 'sign'), [('sit', -1), ('lightningdit', -1), ('repa', 1)]
)
def test_velocities_go_from_data_to_noise(family, sign):
  arrays, _, params = _read(family)
  for ours, theirs in (('kernel', 'weight'), ('bias', 'bias')):
    np.testing.assert_array_equal(
      params['to_velocity'][ours],
      sign * arrays[f'final_layer.linear.{theirs}'].T,
    )
  same = np.array_equal(
    params['time0']['kernel'], arrays['t_embedder.mlp.0.weight'].T
  )
  assert same == (sign == 1)


def test_a_variance_is_dropped():
  arrays, model, params = _read('sit', learn_sigma=True)
  patch = released_sits.PATCHES['sit']
  channels = model.token_dim // patch**2
  bias = arrays['final_layer.linear.bias'].reshape(patch**2, 2, channels)
  np.testing.assert_array_equal(
    params['to_velocity']['bias'], -bias[:, 0].reshape(-1)
  )
  kernel = arrays['final_layer.linear.weight'].T
  kernel = kernel.reshape(-1, patch**2, 2, channels)[:, :, 0]
  np.testing.assert_array_equal(
    params['to_velocity']['kernel'], -kernel.reshape(model.width, -1)
  )


def test_patches_are_embedded_as_by_a_convolution():
  arrays, model, params = _read('reg')
  patch = released_sits.PATCHES['reg']
  channels = model.token_dim // patch**2
  side = patch * released_sits.SIDE
  image = np.random.default_rng(0).normal(size=(1, side, side, channels))
  tokens = layers.patchify(jnp.asarray(image, jnp.float32), patch)
  cut = image[0, patch : 2 * patch, 2 * patch : 3 * patch]
  kernel = arrays['x_embedder.proj.weight']
  expected = np.einsum('dchw,hwc->d', kernel, cut)
  found = tokens[0, released_sits.SIDE + 2] @ params['token_embed']['kernel']
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_blocks_are_in_their_order_and_cut_where_tokens_are_aligned():
  arrays, model, params = _read('reg')
  assert transformer.segments(model.depth, (2,)) == [(0, 2), (2, 3)]
  for index in range(model.depth):
    name = f'blocks.{index}.mlp.fc1.weight'
    stack = params['blocks_2' if index >= 2 else 'blocks_0']['block']
    kernel = stack['mlp']['up']['kernel'][index % 2]
    np.testing.assert_array_equal(kernel, arrays[name].T)


def test_heads_of_their_own_norm():
  arrays = released_sits.state_dict('sit', depth=1)
  of_head = released_sits.WIDTH // released_sits.HEADS
  for name in 'qk':
    for part in ('weight', 'bias'):
      key = f'blocks.0.attn.{name}_norm.{part}'
      arrays[key] = np.full(of_head, ord(name), np.float32)
  model = _model(arrays, 'sit')
  assert model.qk_norm
  params = sit_weights.read(arrays, model, 'sit', 'test')
  attention = params['blocks_0']['block']['attn']
  assert (attention['query_norm']['scale'] == ord('q')).all()
  assert (attention['key_norm']['bias'] == ord('k')).all()


def test_a_gradient_goes_back_to_the_names_of_the_file():
  arrays, model, params = _read('sit', learn_sigma=True)
  layout = sit_weights.layout_of(arrays, model, 'sit')

  def total(weights):
    taken = sit_weights.assemble(
      lambda name, *shape: weights[name], model, layout
    )
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(taken)) / 2

  weights = {name: jnp.asarray(array) for name, array in arrays.items()}
  gradients = jax.grad(total)(weights)
  for name in ('t_embedder.mlp.0.weight', 'x_embedder.proj.weight'):
    # Rotations and transpositions keep lengths.
    np.testing.assert_allclose(gradients[name], arrays[name], atol=1e-5)


def test_all_that_does_not_fit_is_in_one_error():
  arrays = released_sits.state_dict('reg')
  model = _model(arrays, 'reg')
  changed = dict(arrays) | {
    'decoder.weight': np.zeros(3, np.float32),
    'wg_norm.weight': np.zeros(3, np.float32),
    'cls_projectors2.bias': np.full(released_sits.WIDTH, np.nan, np.float32),
  }
  for name in ('blocks.1.attn.qkv.bias', 'pos_embed'):
    del changed[name]
  with pytest.raises(errors.WeightsError) as caught:
    sit_weights.read(changed, model, 'reg', 'some.pt')
  for words in (
    'some.pt does not fit reg of width 16',
    '2 missing: pos_embed; blocks.1.attn.qkv.bias',
    'unexpected: decoder.weight',
    'wg_norm.weight is (3,), wanted (16,)',
    'not finite numbers: cls_projectors2.bias',
  ):
    assert words in str(caught.value)


def test_positions_that_were_learnt_are_refused():
  arrays = released_sits.state_dict('softvq')
  model = _model(arrays, 'softvq')
  arrays['pos_embed'][0, 3, 5] += 0.1
  with pytest.raises(errors.WeightsError, match=r'up to 0\.1 away'):
    sit_weights.read(arrays, model, 'softvq', 'test')
  # A raster is no sequence.
  model = model.clone(positions='2d')
  with pytest.raises(errors.WeightsError, match='fixed sines and cosines'):
    sit_weights.read(
      released_sits.state_dict('softvq'), model, 'softvq', 'test'
    )


def test_positions_in_16_bits_are_the_same():
  arrays = released_sits.state_dict('sit')
  arrays['pos_embed'] = arrays['pos_embed'].astype(np.float16)
  sit_weights.read(arrays, _model(arrays, 'sit'), 'sit', 'test')
