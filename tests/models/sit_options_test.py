"""The class token, what is aligned, and the options of SiT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import sit
from tests.models import sits

REG = {'cls_dim': 5, 'align_dim': 7, 'align_depth': 2, 'projector_width': 8}


def test_reg_starts_at_zero_velocities():
  out = sits.run(sits.params(**REG), *sits.inputs(5), **REG)
  assert out.tokens.shape == (
    sits.B,
    sits.SMALL['num_tokens'],
    sits.SMALL['token_dim'],
  )
  assert out.cls.shape == (sits.B, 5)
  np.testing.assert_array_equal(out.tokens, 0.0)
  np.testing.assert_array_equal(out.cls, 0.0)


def test_class_token_and_tokens_see_each_other():
  x, t, labels, cls = sits.inputs(5)
  base = sits.run(sits.awake(**REG), x, t, labels, cls, **REG)
  other_cls = sits.run(sits.awake(**REG), x, t, labels, -cls, **REG)
  other_x = sits.run(sits.awake(**REG), -x, t, labels, cls, **REG)
  assert np.abs(base.tokens - other_cls.tokens).max(axis=(1, 2)).min() > 1e-4
  assert np.abs(base.cls - other_x.cls).max(axis=1).min() > 1e-4


@pytest.mark.parametrize('align_dim', [5, 7])
def test_what_is_aligned_is_of_the_teachers_widths(align_dim):
  fields = REG | {'align_dim': align_dim}
  params = sits.awake(**fields)
  # One projector serves both where the widths are equal, as in REG.
  assert ('cls_projector' in params['params']) == (align_dim != 5)
  key = jax.random.key(0)
  out = sits.run(params, *sits.inputs(5), train=True, key=key, **fields)
  assert out.aligned.shape == (sits.B, sits.SMALL['num_tokens'], align_dim)
  assert out.aligned_cls.shape == (sits.B, 5)
  # Outside training nobody asks for it.
  assert sits.run(params, *sits.inputs(5), **fields).aligned is None


@pytest.mark.parametrize('rope', [False, True])
def test_positions_may_be_those_of_a_rectangle(rope):
  fields = {'num_tokens': 6, 'width': 16, 'heads': 2, 'rope': rope}
  tall, wide, square = (
    sit.SiT(**sits.SMALL | fields | {'positions': p} | more)
    for p, more in (
      ('3x2', {}),
      ('2x3', {}),
      ('2d', {'num_tokens': 9}),
    )
  )
  assert (tall.grid, wide.grid, square.grid) == ((3, 2), (2, 3), (3, 3))
  whole = square._positions().reshape(3, 3, 16)
  for model in (tall, wide):
    model.check()
    rows, columns = model.grid
    np.testing.assert_array_equal(
      model._positions(), whole[:rows, :columns].reshape(6, 16)
    )
  if rope:
    angles = square._angles().reshape(3, 3, -1)
    np.testing.assert_array_equal(tall._angles(), angles[:, :2].reshape(6, -1))
  named = sit.SiT(**sits.SMALL | {'positions': '2x2'})
  assert named._positions().tolist() == (
    sit.SiT(**sits.SMALL | {'positions': '2d'})._positions().tolist()
  )


@pytest.mark.parametrize(
  ('positions', 'tokens'),
  [('2x3', 4), ('3d', 4), ('0x4', 4), ('4', 4), ('2x2x1', 4), ('-2x-2', 4)],
)
def test_positions_that_are_no_grid_of_the_tokens(positions, tokens):
  model = sit.SiT(**sits.SMALL | {'positions': positions, 'num_tokens': tokens})
  with pytest.raises(
    errors.ConfigError, match=f"positions='{positions}'; wanted.*4 tokens"
  ):
    model.check()


def test_alignment_reads_the_blocks_up_to_its_depth():
  params = sits.awake(**REG)
  changed = {'params': dict(params['params'])}
  changed['params']['blocks_2'] = jax.tree.map(
    lambda a: -a, params['params']['blocks_2']
  )
  key = jax.random.key(0)
  one, two = (
    sits.run(p, *sits.inputs(5), train=True, key=key, **REG)
    for p in (params, changed)
  )
  np.testing.assert_array_equal(one.aligned, two.aligned)
  assert np.abs(one.tokens - two.tokens).max() > 1e-4


def test_two_stacks_compute_what_one_does():
  fields = {'align_dim': 7, 'align_depth': 2, 'projector_width': 8}
  params = sits.awake(**fields)['params']
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
    sits.apply({'params': joined}, *sits.inputs()),
    sits.apply({'params': params}, *sits.inputs(), **fields),
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
    {k: v.shape for k, v in _flat(sits.awake(**f)).items()}
    for f in ({}, fields)
  )
  same_shapes = fields.keys() <= {'rope', 'positions', 'heads'}
  assert (plain == changed) == same_shapes
  velocity = sits.apply(sits.awake(**fields), *sits.inputs(), **fields)
  assert np.all(np.isfinite(velocity))
  if same_shapes:
    gap = velocity - sits.apply(sits.awake(), *sits.inputs())
    assert np.abs(gap).max() > 1e-3


def _flat(tree):
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_rotary_positions_leave_the_class_token_alone():
  model = sit.SiT(**sits.SMALL | REG | {'rope': True})
  angles = model.bind(sits.awake(**REG))._angles()
  assert angles.shape == (
    sits.SMALL['num_tokens'] + 1,
    sits.SMALL['width'] // 4,
  )
  np.testing.assert_array_equal(angles[0], 0.0)
  np.testing.assert_array_equal(angles[1], 0.0)
  assert np.all(angles[2] > 0)
