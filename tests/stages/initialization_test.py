import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors, placement
from selfboottok_jax.models import encoder
from selfboottok_jax.pretrained import vit
from selfboottok_jax.stages import initialization
from selfboottok_jax.training import sharding
from selfboottok_jax.training import state as state_lib
from tests import tiny

# The transformer of tiny.TOKENIZER's encoder, its stack in two segments.
MODEL = tiny.make_tokenizer(layer_scale=1e-5, encoder_depth=3)
SIDE = MODEL.image_size // MODEL.patch_size
NETWORK = vit.Vit(
  (SIDE, SIDE),
  MODEL.patch_size,
  MODEL.encoder_width,
  3,
  MODEL.encoder_width // MODEL.head_dim,
  4 * MODEL.encoder_width,
  layer_scale=True,
  taps=(1, 3),
)


@pytest.fixture(scope='module')
def params():
  fresh = tiny.noise_for(NETWORK.init, jax.random.key(0), tiny.images(1))
  return tiny.awake(fresh['params'])


def test_encoder_is_the_transformer_with_queries_for_registers(params):
  """Attention knows no order, and registers have no position either."""
  k, width = MODEL.num_tokens, MODEL.encoder_width
  module = encoder.Encoder(
    MODEL.patch_size, k, MODEL.token_dim, width, 3, NETWORK.heads,
    layer_scale=1e-5,
  )  # fmt: skip
  images = tiny.images(2)
  fresh = jax.jit(module.init)(jax.random.key(1), images)['params']
  fresh = tiny.awake(fresh)
  mapped = initialization.encoder_params(
    NETWORK, params, SIDE, MODEL.patch_size
  )
  assert set(mapped) | set(initialization.FRESH) == set(fresh)
  codes = jax.jit(module.apply)({'params': fresh | mapped}, images)

  registered = NETWORK.clone(registers=k)
  output = jax.jit(registered.apply)(
    {'params': params | {'registers': fresh['latent_queries']}}, images
  )
  # Behind the class token, before the final norm.
  tokens = np.asarray(output.hidden[3][:, 1 : 1 + k])
  norm, to_code = jax.device_get((params['norm'], fresh['to_code']))
  centred = tokens - tokens.mean(-1, keepdims=True)
  normed = centred / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
  normed = normed * norm['scale'] + norm['bias']
  expected = normed @ to_code['kernel'] + to_code['bias']
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(codes, expected, atol=1e-4, rtol=1e-4)


def test_positions_are_resampled_to_rows_and_columns(params):
  """A table that grows down the rows still does, and on the columns' way."""
  width = MODEL.encoder_width
  rows, columns = np.meshgrid(np.arange(4.0), np.arange(4.0), indexing='ij')
  table = np.stack([rows, columns] * (width // 2), -1).reshape(1, 16, width)
  mapped = initialization.encoder_params(
    NETWORK,
    params | {'positions': table.astype(np.float32)},
    (8, 2),
    MODEL.patch_size,
  )
  found = mapped['patch_positions'].reshape(8, 2, width)
  down, right = found[..., 0], found[..., 1]
  assert (np.diff(down, axis=0) > 0).all()
  np.testing.assert_allclose(down[:, 0], down[:, 1], atol=1e-6)
  assert (np.diff(right, axis=1) > 0).all()
  np.testing.assert_allclose(right[:1].repeat(8, 0), right, atol=1e-6)
  # The middle is where it was.
  np.testing.assert_allclose(down.mean(), 1.5, atol=1e-6)
  np.testing.assert_allclose(right.mean(), 1.5, atol=1e-6)


@pytest.mark.parametrize('fsdp', [pytest.param(1, marks=pytest.mark.slow), 4])
def test_fresh_state_takes_all_but_queries_and_codes(params, fsdp, monkeypatch):
  monkeypatch.setattr(placement, 'MIN_SIZE', 1)
  mesh = sharding.make_mesh(data=-1, fsdp=fsdp)

  def init():
    group = MODEL.init(jax.random.key(2), tiny.images(1))['params']
    return state_lib.init_state(
      {'tokenizer': group, 'discriminator': {'w': jnp.ones(3)}},
      {},
      {},
      ('tokenizer',),
    )

  where = sharding.tree_shardings(jax.eval_shape(init), mesh)
  fresh = jax.jit(init, out_shardings=where)()
  state = initialization.start_encoder(fresh, MODEL, NETWORK, params, 'test')
  jax.tree.map(
    lambda new, old: (
      new.sharding.is_equivalent_to(old.sharding, new.ndim)
      or pytest.fail(f'{new.sharding} for {old.sharding}')
    ),
    state,
    fresh,
  )
  kernel = state.params['tokenizer']['encoder']['patch_embed']['kernel']
  assert kernel.sharding.is_fully_replicated == (fsdp == 1)
  before, after = (s.params['tokenizer'] for s in (fresh, state))
  mapped = initialization.encoder_params(
    NETWORK, params, SIDE, MODEL.patch_size
  )
  for name, module in after['encoder'].items():
    taken = name not in initialization.FRESH
    tiny.assert_same(module, mapped[name] if taken else before['encoder'][name])
  for name in before.keys() - {'encoder'}:
    tiny.assert_same(after[name], before[name])
  tiny.assert_same(state.ema['tokenizer'], after)
  tiny.assert_same(state.params['discriminator'], fresh.params['discriminator'])
  # The state is donated to a step: what is in it twice would be deleted.
  leaves = jax.tree.leaves((state.params, state.ema))
  assert len({id(leaf) for leaf in leaves}) == len(leaves)


def test_all_sizes_that_differ_are_in_one_error():
  model = MODEL.clone(encoder_depth=2, head_dim=4, mlp_ratio=2.0)
  with pytest.raises(errors.ConfigError) as caught:
    initialization.check_sizes(model, NETWORK.clone(registers=4), 'dinov2_b')
  for words in (
    'encoder_from=dinov2_b',
    'model.encoder_depth=2, wanted 3',
    'model.head_dim=4, wanted 8',
    'model.mlp_ratio=2.0, wanted 4.0',
    'no DINOv2 without registers',
  ):
    assert words in str(caught.value)
  assert 'encoder_width' not in str(caught.value)
  initialization.check_sizes(MODEL, NETWORK, 'dinov2_b')


def test_a_model_without_gains_is_refused():
  with pytest.raises(errors.ConfigError, match=r'--config\.model\.layer_scale'):
    initialization.check_gains(MODEL.clone(layer_scale=0.0), 'dinov2_b')
  initialization.check_gains(MODEL, 'dinov2_b')


MODULES = {
  'encoder': {'w': jnp.ones(2)},
  'local2d': {'w': jnp.ones(3)},
  'project_transport': {'w': jnp.ones(4)},
}


def test_adopt_takes_over_and_places():
  stored = jax.tree.map(lambda a: np.asarray(7 * a), MODULES)
  device = jax.devices()[3]
  fresh = jax.device_put(MODULES, device)
  taken = initialization.adopt(fresh, stored | {'other': {}}, what='run')
  tiny.assert_same(taken, stored)
  assert {leaf.device for leaf in jax.tree.leaves(taken)} == {device}


@pytest.mark.parametrize('other', [{'w': np.ones(5)}, {'v': np.ones(3)}, None])
def test_adopt_names_what_does_not_fit(other):
  stored = {k: v for k, v in MODULES.items() if k != 'local2d'}
  if other is not None:
    stored['local2d'] = other
  with pytest.raises(
    errors.CheckpointError, match='tokenizer=RUN does not fit: local2d absent'
  ):
    initialization.adopt(MODULES, stored, what='tokenizer=RUN')
  taken = initialization.adopt(
    MODULES, stored, what='RUN', may_differ=('local2d',)
  )
  tiny.assert_same(taken, MODULES)
