import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, trees
from selfboottok_jax.models import sit
from selfboottok_jax.presets import generator as generator_config
from selfboottok_jax.pretrained import (
  autoencoder,
  released_generators,
  sit_weights,
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
    assert kind.family in sit_weights.FAMILIES, name
    config = generator_config.get_config(kind.preset)
    keys = trees.flatten(config.to_dict())
    assert kind.changes.keys() <= keys.keys(), name
    if kind.tokenizer:
      assert autoencoder.is_autoencoder(kind.tokenizer), name
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
