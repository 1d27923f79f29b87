import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, trees
from selfboottok_jax.models import layers, sit, transformer
from selfboottok_jax.presets import generator as generator_config
from selfboottok_jax.pretrained import (
  autoencoders,
  released_generators,
  weight_reader,
)
from tests.inference import released_sits

RELEASED = released_generators.RELEASED
SIZES = {
  'num_tokens': released_sits.SIDE**2,
  'token_dim': released_sits.TOKEN_DIM,
  'num_classes': released_sits.CLASSES,
  'width': released_sits.WIDTH,
  'depth': released_sits.DEPTH,
  'heads': released_sits.HEADS,
  'qk_norm': False,
  'shift': True,
}


@pytest.mark.parametrize(
  ('family', 'own'),
  [
    ('sit', {'positions': '2d', 'cls_dim': 0, 'align_dim': 0}),
    ('softvq', {'positions': '1d', 'mlp': 'gelu', 'mlp_ratio': 4.0}),
    ('repa', {'cls_dim': 0, 'align_dim': 12, 'projector_width': 20}),
    ('reg', {'cls_dim': 12, 'align_dim': 12, 'rope': False}),
    ('lightningdit', {'norm': 'rms', 'mlp': 'swiglu', 'rope': True}),
  ],
)
def test_arrays_tell_the_sizes(family, own):
  arrays = released_sits.state_dict(family)
  fields = released_generators.fields(
    arrays, family, 'test', heads=released_sits.HEADS
  )
  assert (SIZES | own).items() <= fields.items()
  sit.SiT(**fields)


@pytest.mark.parametrize('width', [16, 32, 48, 64, 1152])
def test_a_gated_mlp_keeps_its_width(width):
  hidden = int(2 / 3 * 4 * width)
  arrays = released_sits.state_dict('lightningdit')
  arrays |= {
    'x_embedder.proj.weight': np.zeros((width, 32, 1, 1)),
    'blocks.0.mlp.w3.weight': np.zeros((width, hidden)),
  }
  fields = released_generators.fields(arrays, 'lightningdit', 't', heads=1)
  assert int(2 / 3 * int(width * fields['mlp_ratio'])) == hidden


def test_heads_are_told_by_rotations_or_by_the_width():
  arrays = released_sits.state_dict('lightningdit')
  fields = released_generators.fields(arrays, 'lightningdit', 'test')
  assert fields['heads'] == released_sits.HEADS
  arrays = released_sits.state_dict('sit')
  with pytest.raises(errors.WeightsError, match='16 wide.*--heads=16'):
    released_generators.fields(arrays, 'sit', 'test')
  with pytest.raises(errors.WeightsError, match='wanted a divisor of 16'):
    released_generators.fields(arrays, 'sit', 'test', heads=3)
  arrays['x_embedder.proj.weight'] = np.zeros((1152, 4, 2, 2))
  assert released_generators.fields(arrays, 'sit', 'test')['heads'] == 16


@pytest.mark.parametrize(
  ('found', 'given'),
  [
    ('reg', 'sit'), ('sit', 'reg'), ('lightningdit', 'sit'), ('repa', 'sit'),
    ('softvq', 'repa'), ('sit', 'lightningdit'), ('sit', 'softvq'),
  ],
)  # fmt: skip
def test_another_family_is_refused(found, given):
  arrays = released_sits.state_dict(found)
  with pytest.raises(errors.WeightsError) as caught:
    released_generators.fields(arrays, given, 'some.pt')
  assert f'read as {given}, and by its arrays is {found}' in str(caught.value)
  assert {kind.family for kind in RELEASED.values()} >= {found, given}


def test_repa_may_have_lost_its_projector():
  arrays = released_sits.state_dict('sit')
  fields = released_generators.fields(arrays, 'repa', 'test', heads=2)
  assert fields['align_dim'] == 0


@pytest.mark.parametrize(
  'change',
  [
    {'pos_embed': None},
    {'pos_embed': np.zeros((4, 4))},
    {'blocks.0.mlp.fc2.weight': None},
    {'y_embedder.embedding_table.weight': np.zeros(3)},
  ],
)
def test_arrays_of_something_else(change):
  arrays = released_sits.state_dict('sit') | change
  arrays = {k: v for k, v in arrays.items() if v is not None}
  (name,) = change
  with pytest.raises(errors.WeightsError) as caught:
    released_generators.fields(arrays, 'sit', 'some.pt', heads=2)
  assert 'some.pt is no SiT' in str(caught.value)
  assert name in str(caught.value)


def test_the_table_names_what_there_is():
  sizes = generator_config.SIZES.values()
  assert {s['width']: s['heads'] for s in sizes} == released_generators.HEADS
  for name, kind in RELEASED.items():
    assert kind.family in released_generators.FAMILIES, name
    config = generator_config.get_config(kind.preset)
    keys = trees.flatten(config.to_dict())
    assert kind.changes.keys() <= keys.keys(), name
    if kind.tokenizer:
      assert autoencoders.is_autoencoder(kind.tokenizer), name
    assert len(kind.published.files) == 1, name


@pytest.mark.parametrize('name', list(RELEASED))
def test_parameters_are_as_many_as_the_table_says(name):
  kind = RELEASED[name]
  config = generator_config.get_config(kind.preset)
  fields = config.model.to_dict()
  if kind.family == 'softvq':
    sizes = {'num_tokens': 64, 'token_dim': 32, 'positions': '1d'}
  else:
    latent = 32 if kind.tokenizer == 'vavae' else 16
    sizes = {'num_tokens': 256, 'token_dim': latent, 'positions': '2d'}
  aligned = {'repa': {'align_dim': 768}, 'reg': {'align_dim': 768}}
  model = sit.SiT(
    num_classes=1000,
    cls_dim=768 if kind.family == 'reg' else 0,
    **{**fields, **sizes, **aligned.get(kind.family, {})},
  )
  x = jnp.zeros((1, model.num_tokens, model.token_dim))
  cls = jnp.zeros((1, model.cls_dim)) if model.cls_dim else None
  shapes = jax.eval_shape(
    model.init, jax.random.key(0), x, jnp.zeros(1), jnp.zeros(1, int), cls
  )
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert round(count / 1e6, 1) == kind.published.millions


def _model(arrays, family, **changes):
  fields = released_generators.fields(
    arrays, family, 'test', heads=released_sits.HEADS
  )
  return sit.SiT(**{**fields, 'align_depth': 2, **changes})


def _read(family, **options):
  arrays = released_sits.state_dict(family, **options)
  model = _model(arrays, family)
  return arrays, model, released_generators.read(arrays, model, family, 'test')


@pytest.mark.parametrize('family', list(released_generators.FAMILIES))
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
    turned = np.asarray(released_generators.reverse_time(kernel))
    again = np.asarray(released_generators.reverse_time(turned))
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
  params = released_generators.read(arrays, model, 'sit', 'test')
  attention = params['blocks_0']['block']['attn']
  assert (attention['query_norm']['scale'] == ord('q')).all()
  assert (attention['key_norm']['bias'] == ord('k')).all()


def test_a_gradient_goes_back_to_the_names_of_the_file():
  arrays, model, params = _read('sit', learn_sigma=True)
  form = released_generators.form_of(arrays, model, 'sit')

  def total(weights):
    taken = released_generators.assemble(
      weight_reader.Reader(weights), model, form
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
    released_generators.read(changed, model, 'reg', 'some.pt')
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
    released_generators.read(arrays, model, 'softvq', 'test')
  # A raster is no sequence.
  model = model.clone(positions='2d')
  with pytest.raises(errors.WeightsError, match='fixed sines and cosines'):
    released_generators.read(
      released_sits.state_dict('softvq'), model, 'softvq', 'test'
    )


def test_positions_in_16_bits_are_the_same():
  arrays = released_sits.state_dict('sit')
  arrays['pos_embed'] = arrays['pos_embed'].astype(np.float16)
  released_generators.read(arrays, _model(arrays, 'sit'), 'sit', 'test')
