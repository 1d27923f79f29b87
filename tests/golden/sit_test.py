"""SiT against the recorded 1D network of SoftVQ's repository."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import layers
from tests.golden import fixtures, sit_weights

pytestmark = pytest.mark.golden


@pytest.mark.parametrize('name', ['softvq_sit1d', 'softvq_sit1d_qknorm'])
def test_network_and_its_gradient(name):
  fixture = fixtures.load('generator', name)
  args, arrays = fixture.meta['model_args'], fixture.arrays
  model = sit_weights.build(args)
  params = sit_weights.convert(fixture.weights, args['depth'])
  x, t = jnp.asarray(arrays['in.x']), jnp.asarray(arrays['in.t'])
  labels = jnp.asarray(arrays['in.y'].astype(np.int32))

  @jax.jit
  def run(x):
    def loss(x):
      v, seen = model.apply(
        params,
        x,
        t,
        labels,
        capture_intermediates=lambda m, _: m.name in ('token_embed', 'time1'),
      )
      return jnp.sum(v * arrays['in.cotangent']), (v, seen['intermediates'])

    return jax.grad(loss, has_aux=True)(x)

  gradient, (v, seen) = run(x)
  table = layers.sincos_1d(args['input_size'], args['hidden_size'])
  for array, actual in (
    ('dbg.embed', seen['token_embed']['__call__'][0]),
    ('dbg.t_emb', seen['time1']['__call__'][0]),
    ('out.v', v),
    ('out.v_fused', v),
    ('out.grad_x', gradient),
  ):
    fixtures.check(name, array, actual, arrays[array])
  fixtures.check(name, 'pos_embed', table[None], fixture.weights['pos_embed'])


def test_tables_of_positions_and_times():
  fixture = fixtures.load('generator', 'tables')
  arrays = fixture.arrays
  rows = arrays['in.rows1d']
  ours = layers.sincos_1d(int(rows.max()) + 1, fixture.meta['D1'])[rows]
  fixtures.check('tables', 'out.pos1d_rows', ours, arrays['out.pos1d_rows'])
  for times, array in (
    ('in.t', 'out.temb_sit'),
    ('in.t', 'out.temb_reg'),
    ('in.t', 'out.temb_odd'),
    ('in.t_big', 'out.temb_big'),
  ):
    want = arrays[array]
    found = layers.timestep_features(jnp.asarray(arrays[times]), want.shape[-1])
    fixtures.check('tables', array, found, want)
