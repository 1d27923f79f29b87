"""LightningDiT's parts and its network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.flow import guidance
from selfboottok_jax.models import layers, sit
from selfboottok_jax.pretrained import released_generators
from tests.golden import networks, records, rounding

pytestmark = pytest.mark.golden


def _linear(weights, name):
  return {
    'kernel': weights[f'{name}.weight'].T,
    'bias': weights[f'{name}.bias'],
  }


def _scale(weights, name):
  return {'scale': weights[f'{name}.weight']}


def _run(module, params, *inputs, **options):
  variables = {'params': jax.tree.map(jnp.asarray, params)}
  inputs = [jnp.asarray(x) for x in inputs]
  return jax.jit(functools.partial(module.apply, **options))(variables, *inputs)


def test_parts():
  with records.opened('ldit_parts') as record:
    x, c = record.arrays['in.x'], record.arrays['in.c']
    _check_norms(record, x)
    mlp = layers.SwiGlu(_ratio(record.weights, 'swiglu'))
    params = {
      'up': _linear(record.weights, 'swiglu.w12'),
      'down': _linear(record.weights, 'swiglu.w3'),
    }
    record.check('out.swiglu', _run(mlp, params, x))
    angles = layers.rotary_angles(
      (record.meta['grid'],) * 2, record.meta['D'] // record.meta['heads']
    )
    _check_rotations(record, angles)
    _check_attention(record, x, angles)
    for part in ('block', 'block_woshift'):
      record.check(f'out.{part}', _block(record, part, x, c, angles))
    record.check('out.final', _final(record, x, c))


def _ratio(weights, name):
  """The ratio of a SwiGLU as wide as the weights are."""
  width, hidden = weights[f'{name}.w3.weight'].shape
  return released_generators.swiglu_ratio(hidden, width)


def test_swiglu_of_any_width():
  # 53 of 40 is where a ratio of 1.5 * 53 / 40 would truncate to 52.
  for width in (8, 40, 48, 56, 96, 768):
    x = jax.ShapeDtypeStruct((1, 1, width), jnp.float32)
    for hidden in (1, 2, 52, 53, 54, 127, 128, 341, 2048):
      mlp = layers.SwiGlu(released_generators.swiglu_ratio(hidden, width))
      made = jax.eval_shape(mlp.init, jax.random.key(0), x)
      assert made['params']['down']['kernel'].shape == (hidden, width)


def _check_norms(record, x):
  norm, params = layers.HEAD_NORMS['rms'], _scale(record.weights, 'rms')
  record.check('out.rmsnorm', _run(norm(), params, x))
  narrow = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (params, x))
  found = _run(norm(dtype='bfloat16'), *narrow)
  array, found = 'out.rmsnorm_bf16_in', found.astype(jnp.float32)
  error = rounding.narrow_product(record.read(array))
  record.check(array, found, error)
  # Without the gain.
  plain = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  record.refuse(array, plain, error, 5)


def _check_rotations(record, angles):
  for array, function in (('cos', np.cos), ('sin', np.sin)):
    # Each angle is that of two neighbouring columns.
    table = np.repeat(function(angles), 2, axis=-1)
    record.check(f'out.rope_{array}', table)

  def rotated(q, angles):
    # Heads come first there.
    q = jnp.asarray(q).transpose(0, 2, 1, 3)
    turned = layers.rotate(q, jnp.asarray(angles, jnp.float32))
    return turned.transpose(0, 2, 1, 3)

  q = record.arrays['in.q']
  record.check('out.rope_q', rotated(q, angles))
  quarter = np.full_like(angles, np.pi / 2)
  record.check('out.rotate_half', rotated(q, quarter))
  # A finer grid over the same places, as no module here asks for it.
  grid, wide = record.meta['grid'], record.arrays['in.q2']
  side = round(wide.shape[2] ** 0.5)
  finer = layers.rotary_angles((side, side), wide.shape[-1]) * grid / side
  record.check('out.rope_q_interp', rotated(wide, finer))


def _attention(weights, name, *, norms):
  params = {
    'qkv': _linear(weights, f'{name}.qkv'),
    'out': _linear(weights, f'{name}.proj'),
  }
  if norms:
    params['query_norm'] = _scale(weights, f'{name}.q_norm')
    params['key_norm'] = _scale(weights, f'{name}.k_norm')
  return params


def _check_attention(record, x, angles):
  heads = record.meta['heads']
  params = _attention(record.weights, 'attn', norms=True)
  attend = layers.Attention(heads, 'rms')
  found = _run(attend, params, x, angles=jnp.asarray(angles))
  record.check('out.attn_rms_rope_fused', found)
  record.check('out.attn_rms_rope_explicit', found)
  params = _attention(record.weights, 'attn_plain', norms=False)
  attend = layers.Attention(heads)
  record.check('out.attn_plain', _run(attend, params, x))
  found = _run(attend, params, x, angles=jnp.asarray(angles))
  record.check('out.attn_plain_rope', found)


def _block(record, part, x, c, angles):
  weights, plain = record.weights, part == 'block'
  module = sit.Modulated(
    record.meta['heads'],
    norm='rms',
    mlp='swiglu',
    mlp_ratio=_ratio(weights, f'{part}.mlp'),
    qk_norm=not plain,
    shift=plain,
  )
  params = {
    'attn': _attention(weights, f'{part}.attn', norms=not plain),
    'mlp': {
      'up': _linear(weights, f'{part}.mlp.w12'),
      'down': _linear(weights, f'{part}.mlp.w3'),
    },
    'modulation': _linear(weights, f'{part}.adaLN_modulation.1'),
    'norm1': _scale(weights, f'{part}.norm1'),
    'norm2': _scale(weights, f'{part}.norm2'),
  }
  return _run(module, params, x, c, angles)


def _final(record, x, c):
  """The end of a network whose inputs pass unchanged through its block."""
  weights, (b, k, d) = record.weights, x.shape
  last = _linear(weights, 'final.linear')
  outputs = last['bias'].size
  model = sit.SiT(k, d, b, d, 1, 1, norm='rms', positions='2d')
  zero = {'bias': np.zeros(d, np.float32)}
  nothing = {'kernel': np.zeros((d, d), np.float32), **zero}
  inputs = x - layers.sincos_2d(record.meta['grid'], d), np.zeros(b, np.float32)
  fresh = jax.eval_shape(model.init, jax.random.key(0), *inputs, np.arange(b))
  params = {
    # Gates of zero leave a block nothing but its residual stream.
    'blocks_0': jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype),
      fresh['params']['blocks_0'],
    ),
    'token_embed': {'kernel': np.eye(d, dtype=np.float32), **zero},
    # The condition is that of the label alone.
    'time0': {'kernel': np.zeros((256, d), np.float32), **zero},
    'time1': nothing,
    'label_table': {'embedding': np.pad(c, ((0, 1), (0, 0)))},
    'modulation': _linear(weights, 'final.adaLN_modulation.1'),
    'norm': _scale(weights, 'final.norm_final'),
    # The condition is as wide as the inputs.
    'to_velocity': {
      name: np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, d - outputs)])
      for name, leaf in last.items()
    },
  }
  out = _run(model, params, *inputs, np.arange(b))
  return out.tokens[..., :outputs]


def test_network():
  elsewhere = {'out.sample*': 'compared with the samplers'}
  with records.opened('ldit_model', elsewhere) as record:
    arrays = record.arrays
    network = networks.load(record, 'lightningdit')
    t = 1 - jnp.asarray(arrays['in.t'])
    labels = networks.integers(arrays['in.y'])
    v = jax.jit(network.velocity)(network.tokens(arrays['in.x']), t, labels)
    # Their time runs from noise to data.
    record.check('out.v', -network.images(v))
    for array, time in (('out.v_cfg_below', 0.1), ('out.v_cfg_above', 0.3)):
      record.check_rows(array, _guided(record, network, time))


def _guided(record, network, time):
  """The half that they keep."""
  arrays, meta = record.arrays, record.meta
  x = network.tokens(arrays['in.z'])
  field = guidance.guided(
    network.velocity,
    networks.integers(arrays['in.y_s']),
    null_label=network.model.num_classes,
    scale=network.first_channels(3, meta['cfg_scale']),
    # It ends where theirs begins.
    interval=(0.0, 1 - meta['cfg_interval_start']),
  )
  t = jnp.full(len(x), 1 - time)
  return -network.images(jax.jit(field.at(1 - time))(x, t))
