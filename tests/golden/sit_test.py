"""SiT against the recorded networks of SiT's and SoftVQ's repositories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import guidance
from selfboottok_jax.models import layers
from tests.golden import networks, records, rounding

pytestmark = pytest.mark.golden


@pytest.mark.parametrize('name', ['sit2d', 'sit2d_learnsigma'])
def test_sit_and_its_gradients(name):
  with records.opened(name) as record:
    network = networks.load(record, 'sit')
    t, labels = record.arrays['in.t'], networks.integers(record.arrays['in.y'])

    @jax.jit
    def run(weights, x):
      def loss(weights, x):
        # Their time runs from noise to data.
        out = network.apply(
          network.tokens(x), 1 - jnp.asarray(t), labels, weights=weights
        )
        v = -network.images(out.tokens)
        return jnp.sum(v * record.arrays['in.cotangent']), v

      return jax.grad(loss, argnums=(0, 1), has_aux=True)(weights, x)

    (of_weights, of_x), v = run(
      network.weights, jnp.asarray(record.arrays['in.x'])
    )
    record.check('out.v', v)
    record.check('out.grad_x', of_x)
    # The numerics of an imported generator.
    out = jax.jit(network.model.apply)(
      {'params': network.imported},
      network.tokens(record.arrays['in.x']),
      1 - jnp.asarray(t),
      labels,
    )
    record.check('out.v', -network.images(out.tokens))
    names = record.read('out.grad_names')
    assert set(names) == network.weights.keys() - {'pos_embed'}
    norms = [np.linalg.norm(of_weights[name]) for name in names]
    record.check('out.grad_norms', np.array(norms))
    record.check('out.v_cfg', _guided(record, network))
    dropped = np.where(
      record.arrays['in.force_drop_ids'] == 1,
      network.model.num_classes,
      record.arrays['in.labels_drop'],
    )
    table = network.params()['label_table']['embedding']
    record.check('out.y_emb_dropped', table[dropped])


def _guided(record, network):
  """Both halves of what they make: guided, and where it is not, null."""
  arrays = record.arrays
  count = len(arrays['in.x_cfg']) // 2
  x = network.tokens(arrays['in.x_cfg'][:count])
  labels, null = jnp.split(networks.integers(arrays['in.y_cfg']), 2)
  t, t_null = jnp.split(1 - jnp.asarray(arrays['in.t_cfg']), 2)
  np.testing.assert_array_equal(t, t_null)
  field = guidance.guided(
    network.velocity,
    labels,
    null_label=network.model.num_classes,
    scale=network.first_channels(3, record.meta['cfg_scale']),
  )
  mixed = -network.images(jax.jit(field.inside)(x, t))
  other = -network.images(jax.jit(network.velocity)(x, t, null))
  return jnp.concatenate(
    [mixed, jnp.concatenate([mixed[:, :3], other[:, 3:]], axis=1)]
  )


@pytest.mark.parametrize('name', ['softvq_sit1d', 'softvq_sit1d_qknorm'])
def test_softvq_network_and_its_gradient(name):
  with records.opened(name) as record:
    arrays = record.arrays
    network = networks.load(record, 'softvq')
    t, labels = jnp.asarray(arrays['in.t']), networks.integers(arrays['in.y'])

    @jax.jit
    def run(x):
      def loss(x):
        v, seen = _look(network.model, network.params(), x, t, labels)
        return jnp.sum(v * arrays['in.cotangent']), (v, seen)

      return jax.grad(loss, has_aux=True)(x)

    x = jnp.asarray(arrays['in.x'])
    gradient, (v, seen) = run(x)
    record.check('dbg.embed', seen['token_embed'])
    record.check('dbg.t_emb', seen['time1'])
    record.check('out.v', v)
    record.check('out.v_fused', v)
    record.check('out.grad_x', gradient)
    # A network that ends where they look inside.
    depth, params = record.meta['mid_layer'], network.params()
    params['blocks_0'] = jax.tree.map(lambda a: a[:depth], params['blocks_0'])
    shallow = network.model.clone(depth=depth)
    _, seen = jax.jit(_look, static_argnums=0)(shallow, params, x, t, labels)
    record.check('out.mid', seen['blocks_0'])


def _look(model, params, *inputs):
  """The velocity, and what some modules return."""
  names = ('token_embed', 'time1', 'blocks_0')
  out, seen = model.apply(
    {'params': params},
    *inputs,
    capture_intermediates=lambda module, _: module.name in names,
  )
  seen = {name: seen['intermediates'][name]['__call__'][0] for name in names}
  return out.tokens, seen


def test_tables_of_positions_and_times():
  with records.opened('tables') as record:
    arrays, meta = record.arrays, record.meta
    rows = arrays['in.rows1d']
    width = meta['D1']
    table = layers.sincos_1d(int(rows.max()) + 1, width)
    fraction = np.arange(0, width, 2) / width
    error = rounding.sincos(rows[:, None], fraction).repeat(2, axis=1)
    record.check('out.pos1d_rows', table[rows], error)
    # A neighbouring row, or a table slightly narrower.
    record.refuse('out.pos1d_rows', table[rows - 1], error, 1e4)
    narrow = layers.sincos_1d(int(rows.max()) + 1, width - 2)[rows]
    narrow = np.pad(narrow, ((0, 0), (0, 2)), mode='edge')
    record.refuse('out.pos1d_rows', narrow, error, 100)
    rows = arrays['in.rows2d']
    # The grid of the real networks; the class token has no position.
    table = np.pad(layers.sincos_2d(16, meta['D2']), ((1, 0), (0, 0)))
    # Both compute in float64; ours is rounded once, by half of this.
    error = rounding.UNIT
    record.check('out.pos2d_rows', table[rows], error)
    # Rows before columns.
    swapped = np.roll(table[rows], meta['D2'] // 2, axis=1)
    record.refuse('out.pos2d_rows', swapped, error, 1e6)
    for times, array in (
      ('in.t', 'out.temb_sit'),
      ('in.t', 'out.temb_reg'),
      ('in.t', 'out.temb_odd'),
      ('in.t_big', 'out.temb_big'),
    ):
      width = arrays[array].shape[-1]
      t = arrays[times]
      found = layers.timestep_features(jnp.asarray(t), width)
      half = width // 2
      error = rounding.sincos(t[:, None], np.arange(half) / half)
      # The last column of an odd width is an exact zero.
      error = np.pad(
        np.tile(error, 2), ((0, 0), (0, width % 2)), constant_values=1e-12
      )
      record.check(array, found, error)
      # Sines before cosines.
      swapped = np.roll(found, half, axis=1)
      record.refuse(array, swapped, error, 1e3)
