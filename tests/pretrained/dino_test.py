import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.models import transformer
from selfboottok_jax.pretrained import dino, resample

LARGER, SMALLER = (
  jax.random.uniform(jax.random.key(0), (2, side, side, 3), minval=-1)
  for side in (40, 20)
)


@pytest.fixture(scope='module')
def trunk():
  """Loads a small random trunk for images of 32 pixels."""
  return pretrained.load_trunk('dino_tiny:random')


def _view(crop, row=0, column=0):
  return dino.View(jnp.asarray(crop), jnp.int32(row), jnp.int32(column))


def test_activations_add_the_class_token_to_each_patch(trunk):
  images = LARGER[:, :32, :32]
  activations = trunk(trunk.params, images, _view(False))
  assert len(activations) == 5
  shift, scale = (
    np.asarray(s, np.float32)
    for s in (
      [2 * m - 1 for m in (0.485, 0.456, 0.406)],
      [2 * d for d in (0.229, 0.224, 0.225)],
    )
  )
  normal = (np.asarray(images) - shift) / scale
  hidden = trunk.vit.apply({'params': trunk.params}, jnp.asarray(normal)).hidden
  for tap, activation in zip((0, 1, 2, 3, 4), activations, strict=True):
    assert activation.shape == (2, 16, 48)
    expected = hidden[tap][:, 1:] + hidden[tap][:, :1]
    np.testing.assert_allclose(activation, expected, rtol=1e-4, atol=1e-5)


def test_larger_images_are_cut_or_averaged(trunk):
  cut = jax.jit(trunk.fit)(LARGER, _view(True, 3, 8))
  np.testing.assert_array_equal(cut, LARGER[:, 3:35, 8:40])
  averaged = trunk.fit(LARGER, _view(False, 3, 8))
  # 40 pixels to 32: 5 to 4, and each of the 4 touches two.
  fine = np.repeat(np.repeat(LARGER, 1, axis=1), 1, axis=2)
  rows = [(i * 5 // 4, -(-(i + 1) * 5 // 4)) for i in range(32)]
  assert all(last - first == 2 for first, last in rows)
  for i, j in ((0, 0), (3, 4), (31, 17)):
    block = fine[:, slice(*rows[i]), slice(*rows[j])]
    np.testing.assert_allclose(averaged[:, i, j], block.mean((1, 2)), atol=1e-6)


def test_smaller_images_are_enlarged_without_chance(trunk):
  one, other = (trunk.fit(SMALLER, _view(crop, 1, 1)) for crop in (True, False))
  assert one.shape == (2, 32, 32, 3)
  np.testing.assert_array_equal(one, other)
  # The cubic of torch overshoots more than that of jax.image.
  usual = jax.image.resize(SMALLER, one.shape, 'cubic', antialias=False)
  assert 0.01 < np.abs(one - usual).max() < 0.5
  flat = trunk.fit(jnp.full((1, 20, 20, 3), 0.3), _view(False))
  np.testing.assert_allclose(flat, 0.3, rtol=1e-5)


def test_rectangles_are_cut_or_averaged_side_by_side(trunk):
  wide = jax.random.uniform(jax.random.key(1), (2, 40, 64, 3), minval=-1)
  cut = trunk.fit(wide, _view(True, 3, 20))
  np.testing.assert_array_equal(cut, wide[:, 3:35, 20:52])
  averaged = np.asarray(trunk.fit(wide, _view(False)))
  pairs = np.asarray(wide).reshape(2, 40, 32, 2, 3).mean(3)
  rows = dino.area_matrix(40, 32)
  np.testing.assert_allclose(
    averaged, np.einsum('ij,bjwc->biwc', rows, pairs), atol=1e-5
  )
  # A side that is too short is enlarged, without chance; the other one is as
  # long as it is.
  low = wide[:, :20]
  one, two = (trunk.fit(low, _view(crop, 0, 7)) for crop in (True, False))
  up = resample.resize_matrix(20, 32, antialias=False)
  for found, columns in (
    (one, np.asarray(low)[:, :, 7:39]),
    (two, np.asarray(low).reshape(2, 20, 32, 2, 3).mean(3)),
  ):
    np.testing.assert_allclose(
      found, np.einsum('ij,bjwc->biwc', up, columns), atol=1e-5
    )


@pytest.mark.parametrize(('old', 'new'), [(256, 224), (64, 32), (9, 7)])
def test_area_matrix_keeps_constants_and_the_order(old, new):
  matrix = dino.area_matrix(old, new)
  np.testing.assert_allclose(matrix.sum(1), 1)
  assert (matrix.sum(0) > 0).all()
  centres = matrix @ np.arange(old)
  assert (np.diff(centres) > 0).all()
  if old % new == 0:
    x = np.random.default_rng(0).normal(size=old)
    np.testing.assert_allclose(matrix @ x, x.reshape(new, -1).mean(1))


def test_views_are_drawn_evenly_and_inside(trunk):
  draw = jax.vmap(lambda key: trunk.draw(key, (40, 33)))
  views = draw(jax.random.split(jax.random.key(0), 1000))
  assert 0.45 < np.mean(views.crop) < 0.55
  assert set(np.unique(views.row)) == set(range(9))
  assert set(np.unique(views.column)) == {0, 1}
  whole = trunk.draw(jax.random.key(0), (32, 20))
  assert (whole.row, whole.column) == (0, 0)


def test_gradient_reaches_every_image(trunk):
  def loss(images):
    activations = trunk(trunk.params, images, _view(False))
    return sum(jnp.sum(a**2) for a in activations[1:])

  gradient = jax.jit(jax.grad(loss))(LARGER)
  assert jnp.all(jnp.isfinite(gradient))
  assert jnp.all(jnp.any(gradient != 0, axis=(2, 3)))


def test_published_sizes():
  trunk = dino.build('dino_s16', 'bfloat16')
  assert trunk.params is None
  shapes = jax.eval_shape(trunk.init, jax.random.key(0))
  count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  assert count == pytest.approx(1e6 * trunk.published.millions, rel=0.005)
  assert trunk.side == 224
  assert [a.shape for a in trunk.examples()] == [(1, 196, 384)] * 5


def _state_dict(trunk):
  """The trunk's parameters under the names of the official file."""
  params, arrays = trunk.params, {}

  def put(name, module, key='kernel'):
    array = np.asarray(module[key])
    if key == 'kernel':
      array = array.T
    theirs = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}[key]
    arrays[f'{name}.{theirs}'] = array
    if key != 'bias':
      put(name, module, 'bias')

  side, width = trunk.vit.patch_size, trunk.vit.width
  put('patch_embed.proj', params['patch_embed'])
  kernel = arrays['patch_embed.proj.weight'].reshape(width, side, side, 3)
  arrays['patch_embed.proj.weight'] = kernel.transpose(0, 3, 1, 2)
  put('norm', params['norm'], 'scale')
  # Its own position is added to the class token.
  table = np.asarray(params['positions'])
  arrays['pos_embed'] = np.concatenate([0 * table[:, :1] + 0.25, table], 1)
  arrays['cls_token'] = np.asarray(params['cls']) - np.float32(0.25)
  for first, last in transformer.segments(trunk.vit.depth, trunk.vit.taps):
    stack = params[transformer.segment_name(first)]['block']
    for i in range(first, last):
      block = jax.tree.map(lambda leaf, at=i - first: leaf[at], stack)
      name = f'blocks.{i}'
      put(f'{name}.attn.qkv', block['attn']['qkv'])
      put(f'{name}.attn.proj', block['attn']['out'])
      put(f'{name}.mlp.fc1', block['mlp']['up'])
      put(f'{name}.mlp.fc2', block['mlp']['down'])
      put(f'{name}.norm1', block['norm1'], 'scale')
      put(f'{name}.norm2', block['norm2'], 'scale')
  return arrays


def test_reads_a_file_by_its_official_names(trunk, tmp_path):
  other = dataclasses.replace(trunk, params=trunk.init(jax.random.key(7)))
  path = tmp_path / 'dino.npz'
  np.savez(path, **_state_dict(other))
  loaded = pretrained.load_trunk(f'dino_tiny:{path}')
  for a, b in zip(
    jax.tree.leaves(loaded.params), jax.tree.leaves(other.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_file_of_another_network_is_refused(trunk):
  arrays = _state_dict(trunk)
  del arrays['blocks.3.attn.qkv.weight']
  arrays['cls_token'] = arrays['cls_token'][..., :-1]
  with pytest.raises(errors.WeightsError, match=r'blocks\.3\.attn\.qkv') as e:
    trunk.read(arrays, 'FILE')
  assert 'cls_token' in str(e.value)
  assert 'FILE' in str(e.value)


def test_weights_of_chance_are_always_the_same(trunk):
  again = pretrained.load_trunk('dino_tiny:random', dtype='bfloat16')
  assert again.vit.dtype == 'bfloat16'
  for a, b in zip(
    jax.tree.leaves(again.params), jax.tree.leaves(trunk.params), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_unknown_names_list_the_others():
  with pytest.raises(errors.UserError, match="'nope'.*dino_s16, dino_tiny"):
    pretrained.load_trunk('nope:FILE')
