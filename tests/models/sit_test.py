import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import sit
from tests.models import sits


def test_starts_at_zero_velocity_and_identity_blocks():
  np.testing.assert_array_equal(sits.apply(sits.params(), *sits.inputs()), 0.0)
  params = sits.params()['params']
  for zero in (
    params['modulation'],
    params['to_velocity'],
    params['blocks_0']['block']['modulation'],
  ):
    for leaf in jax.tree.leaves(zero):
      np.testing.assert_array_equal(leaf, 0.0)


def test_initial_scales():
  params = sits.params(width=64, heads=4)['params']
  for name in ('time0', 'time1', 'label_table'):
    weights = params[name]['embedding' if name == 'label_table' else 'kernel']
    np.testing.assert_allclose(np.std(weights), 0.02, rtol=0.1)
  qkv = params['blocks_0']['block']['attn']['qkv']
  np.testing.assert_allclose(
    np.std(qkv['kernel']), np.sqrt(2 / (64 + 3 * 64)), rtol=0.05
  )
  np.testing.assert_array_equal(qkv['bias'], 0.0)
  # Each block of the stack has a draw of its own.
  assert len(np.unique(qkv['kernel'][:, 0, 0])) == sits.SMALL['depth']


def test_velocity_depends_on_position_time_and_label():
  x, t, labels = sits.inputs()
  base = sits.apply(sits.awake(), x, t, labels)
  for other in (
    sits.apply(sits.awake(), x[:, ::-1], t, labels)[:, ::-1],
    sits.apply(sits.awake(), x, t + 0.1, labels),
    sits.apply(sits.awake(), x, t, labels + 1),
  ):
    assert np.abs(base - other).max(axis=(1, 2)).min() > 1e-3


def test_samples_of_a_batch_do_not_see_each_other():
  x, t, labels = sits.inputs()
  gradient = jax.grad(
    lambda x: sits.apply(sits.awake(), x, t, labels)[2].sum()
  )(x)
  seen = np.abs(gradient).max(axis=(1, 2)) > 0
  np.testing.assert_array_equal(seen, np.arange(sits.B) == 2)


def test_label_dropout_puts_the_null_label():
  x, t, labels = sits.inputs()
  null = jnp.full_like(labels, sits.SMALL['num_classes'])
  key = jax.random.key(3)
  conditional = sits.apply(sits.awake(), x, t, labels)
  unconditional = sits.apply(sits.awake(), x, t, null)
  dropped = sits.apply(
    sits.awake(), x, t, labels, train=True, key=key, label_dropout=1.0
  )
  np.testing.assert_allclose(dropped, unconditional, atol=1e-5)
  kept = sits.apply(
    sits.awake(), x, t, labels, train=True, key=key, label_dropout=0.0
  )
  np.testing.assert_allclose(kept, conditional, atol=1e-5)
  assert np.abs(conditional - unconditional).max() > 1e-2
  # Outside training nothing is dropped, and no rng is asked for.
  still = sits.apply(sits.awake(), x, t, labels, label_dropout=1.0)
  np.testing.assert_allclose(still, conditional, atol=1e-5)


def test_label_dropout_has_its_rate():
  many, rate = 2000, 0.3
  x = jnp.ones((many, sits.SMALL['num_tokens'], sits.SMALL['token_dim']))
  t = jnp.full((many,), 0.5)
  labels = jnp.full((many,), 2)
  v = sits.apply(
    sits.awake(),
    x,
    t,
    labels,
    train=True,
    key=jax.random.key(0),
    label_dropout=rate,
  )
  kept = sits.apply(sits.awake(), x[:2], t[:2], labels[:2])[0]
  share = np.mean(np.abs(v - kept[None]).max(axis=(1, 2)) > 1e-3)
  # Four standard deviations.
  assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / many)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{'remat': 'dots'}, {'unroll': 1}])
def test_remat_and_unroll_change_no_values(fields):
  x, t, labels = sits.inputs()

  def run(**fields):
    def loss(params):
      return jnp.sum(sits.apply(params, x, t, labels, **fields) ** 2)

    return jax.jit(jax.value_and_grad(loss))(sits.awake())

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    run(),
    run(**fields),
  )


def test_bfloat16_computes_nearby_and_returns_float32():
  inputs = sits.inputs()
  wide = sits.apply(sits.awake(), *inputs)
  narrow = sits.apply(sits.awake(), *inputs, dtype='bfloat16')
  assert narrow.dtype == jnp.float32
  scale = np.linalg.norm(wide)
  gap = np.linalg.norm(narrow - wide) / scale
  assert 1e-5 < gap < 5e-2
  # What blocks add up in float32 is not rounded once more by each of them.
  mixed = sits.apply(
    sits.awake(), *inputs, dtype='bfloat16', residual_dtype='float32'
  )
  assert np.linalg.norm(mixed - wide) / scale < 0.95 * gap
  leaves = jax.tree.leaves(sits.params(dtype='bfloat16'))
  assert {a.dtype for a in leaves} == {jnp.dtype('float32')}


def test_qk_norm_ignores_the_scale_of_the_queries():
  inputs = sits.inputs()

  def gap(qk_norm):
    params = sits.awake(qk_norm=qk_norm)
    scaled = jax.tree.map(lambda a: a, params)
    qkv = scaled['params']['blocks_0']['block']['attn']['qkv']
    width = sits.SMALL['width']
    for name in qkv:
      qkv[name] = jnp.asarray(qkv[name]).at[..., :width].multiply(30.0)
    return np.abs(
      sits.apply(params, *inputs, qk_norm=qk_norm)
      - sits.apply(scaled, *inputs, qk_norm=qk_norm)
    ).max()

  assert gap(True) < 1e-3
  assert gap(False) > 1e-2


def test_time_is_embedded_in_float32_whatever_the_blocks_compute_in():
  model = sit.SiT(**sits.SMALL, dtype='bfloat16')
  times = jnp.array([0.5, 0.5 + 2**-12])
  # Neighbours that 16 bits round to one.
  assert times[0].astype(jnp.bfloat16) == times[1].astype(jnp.bfloat16)
  x, _, labels = sits.inputs()
  _, seen = model.apply(
    sits.awake(),
    x[:2],
    times,
    labels[:2],
    capture_intermediates=lambda module, _: module.name == 'time1',
  )
  embedded = seen['intermediates']['time1']['__call__'][0]
  assert embedded.dtype == jnp.float32
  assert not np.array_equal(embedded[0], embedded[1])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    *(
      ({name: 0}, rf'model\.{name}=0; wanted 1 or more')
      for name in (
        *('width', 'depth', 'heads', 'align_depth', 'projector_width'),
      )
    ),
    *(
      ({name: 'other'}, rf"model\.{name}='other'; wanted one of")
      for name in sit.CHOICES
    ),
    ({'unroll': -1}, r'model\.unroll=-1; wanted 0 or more'),
    ({'mlp_ratio': 0.0}, r'model\.mlp_ratio=0.0; wanted a number above 0'),
    (
      {'label_dropout': -0.1},
      r'model\.label_dropout=-0.1; wanted a number from 0 to 1',
    ),
    (
      {'align_dim': 4, 'align_depth': 9},
      r'model\.align_depth=9; wanted 1 to model\.depth=3',
    ),
    (
      {'heads': 3},
      r'model\.width=16 does not divide by model\.heads=3; change one',
    ),
    (
      {'rope': True, 'positions': '2d', 'width': 12},
      r'heads of 6 \(model\.width=12, model\.heads=2\); wanted heads of a '
      'multiple of 4',
    ),
    (
      {'positions': '2d', 'width': 18},
      r'model\.width=18; wanted a multiple of 4',
    ),
    (
      {'positions': '2d', 'num_tokens': 6},
      r'model\.num_tokens=6; wanted a square number',
    ),
    ({'num_classes': 0}, r'model\.num_classes=0; wanted 1 or more'),
  ],
  ids=str,
)
def test_fields_that_cannot_be_used_are_named(fields, message):
  model = sit.SiT(**sits.SMALL | fields)
  with pytest.raises(errors.ConfigError, match=message):
    model.check()
  with pytest.raises(errors.ConfigError):
    jax.eval_shape(model.init, jax.random.key(0), *sits.inputs())
