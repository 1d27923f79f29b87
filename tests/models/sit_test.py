import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import sit

SMALL = {
  'num_tokens': 4,
  'token_dim': 3,
  'num_classes': 10,
  'width': 16,
  'depth': 3,
  'heads': 2,
}
B = 6


def _inputs(cls_dim=0):
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (B, SMALL['num_tokens'], SMALL['token_dim']))
  inputs = x, jax.random.uniform(keys[1], (B,)), jnp.arange(B)
  if not cls_dim:
    return inputs
  return (*inputs, jax.random.normal(keys[2], (B, cls_dim)))


@functools.cache
def _params(**fields):
  inputs = _inputs(fields.get('cls_dim', 0))
  return jax.jit(sit.SiT(**SMALL | fields).init)(jax.random.key(0), *inputs)


@functools.cache
def _awake(**fields):
  """Parameters away from the zeros of the first step."""
  leaves, tree = jax.tree.flatten(_params(**fields))
  rng = np.random.default_rng(1)
  return tree.unflatten(
    [a + 0.2 * rng.normal(size=a.shape).astype(np.float32) for a in leaves]
  )


@functools.cache
def _compiled(train, fields):
  model = sit.SiT(**SMALL | dict(fields))

  @jax.jit
  def apply(params, key, *inputs):
    rngs = None if key is None else {'dropout': key}
    return model.apply(params, *inputs, train=train, rngs=rngs)

  return apply


def _run(params, *inputs, train=False, key=None, **fields):
  return _compiled(train, tuple(fields.items()))(params, key, *inputs)


def _apply(params, *inputs, **options):
  """The velocity of the tokens."""
  return _run(params, *inputs, **options).tokens


def test_starts_at_zero_velocity_and_identity_blocks():
  np.testing.assert_array_equal(_apply(_params(), *_inputs()), 0.0)
  params = _params()['params']
  for zero in (
    params['modulation'],
    params['to_velocity'],
    params['blocks_0']['block']['modulation'],
  ):
    for leaf in jax.tree.leaves(zero):
      np.testing.assert_array_equal(leaf, 0.0)


def test_initial_scales():
  params = _params(width=64, heads=4)['params']
  for name in ('time0', 'time1', 'label_table'):
    weights = params[name]['embedding' if name == 'label_table' else 'kernel']
    np.testing.assert_allclose(np.std(weights), 0.02, rtol=0.1)
  qkv = params['blocks_0']['block']['attn']['qkv']
  np.testing.assert_allclose(
    np.std(qkv['kernel']), np.sqrt(2 / (64 + 3 * 64)), rtol=0.05
  )
  np.testing.assert_array_equal(qkv['bias'], 0.0)
  # Each block of the stack has a draw of its own.
  assert len(np.unique(qkv['kernel'][:, 0, 0])) == SMALL['depth']


def test_velocity_depends_on_position_time_and_label():
  x, t, labels = _inputs()
  base = _apply(_awake(), x, t, labels)
  for other in (
    _apply(_awake(), x[:, ::-1], t, labels)[:, ::-1],
    _apply(_awake(), x, t + 0.1, labels),
    _apply(_awake(), x, t, labels + 1),
  ):
    assert np.abs(base - other).max(axis=(1, 2)).min() > 1e-3


def test_samples_of_a_batch_do_not_see_each_other():
  x, t, labels = _inputs()
  gradient = jax.grad(lambda x: _apply(_awake(), x, t, labels)[2].sum())(x)
  seen = np.abs(gradient).max(axis=(1, 2)) > 0
  np.testing.assert_array_equal(seen, np.arange(B) == 2)


def test_label_dropout_puts_the_null_label():
  x, t, labels = _inputs()
  null = jnp.full_like(labels, SMALL['num_classes'])
  key = jax.random.key(3)
  conditional = _apply(_awake(), x, t, labels)
  unconditional = _apply(_awake(), x, t, null)
  dropped = _apply(
    _awake(), x, t, labels, train=True, key=key, label_dropout=1.0
  )
  np.testing.assert_allclose(dropped, unconditional, atol=1e-5)
  kept = _apply(_awake(), x, t, labels, train=True, key=key, label_dropout=0.0)
  np.testing.assert_allclose(kept, conditional, atol=1e-5)
  assert np.abs(conditional - unconditional).max() > 1e-2
  # Outside training nothing is dropped, and no rng is asked for.
  still = _apply(_awake(), x, t, labels, label_dropout=1.0)
  np.testing.assert_allclose(still, conditional, atol=1e-5)


def test_label_dropout_has_its_rate():
  many, rate = 2000, 0.3
  x = jnp.ones((many, SMALL['num_tokens'], SMALL['token_dim']))
  t = jnp.full((many,), 0.5)
  labels = jnp.full((many,), 2)
  v = _apply(
    _awake(),
    x,
    t,
    labels,
    train=True,
    key=jax.random.key(0),
    label_dropout=rate,
  )
  kept = _apply(_awake(), x[:2], t[:2], labels[:2])[0]
  share = np.mean(np.abs(v - kept[None]).max(axis=(1, 2)) > 1e-3)
  # Four standard deviations.
  assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / many)


@pytest.mark.parametrize('fields', [{'remat': True}, {'unroll': 3}])
def test_remat_and_unroll_change_no_values(fields):
  x, t, labels = _inputs()

  def run(**fields):
    def loss(params):
      return jnp.sum(_apply(params, x, t, labels, **fields) ** 2)

    return jax.jit(jax.value_and_grad(loss))(_awake())

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    run(),
    run(**fields),
  )


def test_bfloat16_computes_nearby_and_returns_float32():
  inputs = _inputs()
  wide = _apply(_awake(), *inputs)
  narrow = _apply(_awake(), *inputs, dtype='bfloat16')
  assert narrow.dtype == jnp.float32
  gap = np.linalg.norm(narrow - wide) / np.linalg.norm(wide)
  assert 1e-5 < gap < 5e-2
  leaves = jax.tree.leaves(_params(dtype='bfloat16'))
  assert {a.dtype for a in leaves} == {jnp.dtype('float32')}


def test_qk_norm_ignores_the_scale_of_the_queries():
  inputs = _inputs()

  def gap(qk_norm):
    params = _awake(qk_norm=qk_norm)
    scaled = jax.tree.map(lambda a: a, params)
    qkv = scaled['params']['blocks_0']['block']['attn']['qkv']
    width = SMALL['width']
    for name in qkv:
      qkv[name] = jnp.asarray(qkv[name]).at[..., :width].multiply(30.0)
    return np.abs(
      _apply(params, *inputs, qk_norm=qk_norm)
      - _apply(scaled, *inputs, qk_norm=qk_norm)
    ).max()

  assert gap(True) < 1e-3
  assert gap(False) > 1e-2


def test_time_is_embedded_in_float32_whatever_the_blocks_compute_in():
  model = sit.SiT(**SMALL, dtype='bfloat16')
  times = jnp.array([0.5, 0.5 + 2**-12])
  # Neighbours that 16 bits round to one.
  assert times[0].astype(jnp.bfloat16) == times[1].astype(jnp.bfloat16)
  x, _, labels = _inputs()
  _, seen = model.apply(
    _awake(),
    x[:2],
    times,
    labels[:2],
    capture_intermediates=lambda module, _: module.name == 'time1',
  )
  embedded = seen['intermediates']['time1']['__call__'][0]
  assert embedded.dtype == jnp.float32
  assert not np.array_equal(embedded[0], embedded[1])


REG = {'cls_dim': 5, 'align_dim': 7, 'align_depth': 2, 'projector_width': 8}


def test_reg_starts_at_zero_velocities():
  out = _run(_params(**REG), *_inputs(5), **REG)
  assert out.tokens.shape == (B, SMALL['num_tokens'], SMALL['token_dim'])
  assert out.cls.shape == (B, 5)
  np.testing.assert_array_equal(out.tokens, 0.0)
  np.testing.assert_array_equal(out.cls, 0.0)


def test_class_token_and_tokens_see_each_other():
  x, t, labels, cls = _inputs(5)
  base = _run(_awake(**REG), x, t, labels, cls, **REG)
  other_cls = _run(_awake(**REG), x, t, labels, -cls, **REG)
  other_x = _run(_awake(**REG), -x, t, labels, cls, **REG)
  assert np.abs(base.tokens - other_cls.tokens).max(axis=(1, 2)).min() > 1e-4
  assert np.abs(base.cls - other_x.cls).max(axis=1).min() > 1e-4


@pytest.mark.parametrize('align_dim', [5, 7])
def test_what_is_aligned_is_of_the_teachers_widths(align_dim):
  fields = REG | {'align_dim': align_dim}
  params = _awake(**fields)
  # One projector serves both where the widths are equal, as in REG.
  assert ('cls_projector' in params['params']) == (align_dim != 5)
  key = jax.random.key(0)
  out = _run(params, *_inputs(5), train=True, key=key, **fields)
  assert out.aligned.shape == (B, SMALL['num_tokens'], align_dim)
  assert out.aligned_cls.shape == (B, 5)
  # Outside training nobody asks for it.
  assert _run(params, *_inputs(5), **fields).aligned is None


def test_alignment_reads_the_blocks_up_to_its_depth():
  params = _awake(**REG)
  changed = {'params': dict(params['params'])}
  changed['params']['blocks_2'] = jax.tree.map(
    lambda a: -a, params['params']['blocks_2']
  )
  key = jax.random.key(0)
  one, two = (
    _run(p, *_inputs(5), train=True, key=key, **REG) for p in (params, changed)
  )
  np.testing.assert_array_equal(one.aligned, two.aligned)
  assert np.abs(one.tokens - two.tokens).max() > 1e-4


def test_two_stacks_compute_what_one_does():
  fields = {'align_dim': 7, 'align_depth': 2, 'projector_width': 8}
  params = _awake(**fields)['params']
  joined = {
    k: v
    for k, v in params.items()
    if not k.startswith('blocks_') and k != 'projector'
  }
  joined['blocks_0'] = jax.tree.map(
    lambda *parts: jnp.concatenate(parts),
    params['blocks_0'],
    params['blocks_2'],
  )
  np.testing.assert_allclose(
    _apply({'params': joined}, *_inputs()),
    _apply({'params': params}, *_inputs(), **fields),
    atol=1e-5,
  )


@pytest.mark.parametrize(
  'fields',
  [
    {'norm': 'rms'},
    {'mlp': 'swiglu'},
    {'rope': True},
    {'rope': True, 'positions': '2d', 'heads': 2},
    {'shift': False},
    {'norm': 'rms', 'qk_norm': True},
  ],
  ids=str,
)
def test_options_change_the_network(fields):
  plain, changed = (
    {k: v.shape for k, v in _flat(_params(**f)).items()} for f in ({}, fields)
  )
  same_shapes = fields.keys() <= {'rope', 'positions', 'heads'}
  assert (plain == changed) == same_shapes
  velocity = _apply(_awake(**fields), *_inputs(), **fields)
  assert np.all(np.isfinite(velocity))
  if same_shapes:
    gap = velocity - _apply(_awake(), *_inputs())
    assert np.abs(gap).max() > 1e-3


def _flat(tree):
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_rotary_positions_leave_the_class_token_alone():
  model = sit.SiT(**SMALL | REG | {'rope': True})
  angles = model.bind(_params(**REG))._angles()
  assert angles.shape == (SMALL['num_tokens'] + 1, SMALL['width'] // 4)
  np.testing.assert_array_equal(angles[0], 0.0)
  np.testing.assert_array_equal(angles[1], 0.0)
  assert np.all(angles[2] > 0)
