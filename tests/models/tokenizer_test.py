import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import aligners, tokenizer
from tests import tiny

B = 4
SOFTVQ = {'local1d_width': 0, 'local2d_depth': 0}
ONE_LOCAL = {'local2d_depth': 0}


@functools.cache
def _fresh(**fields):
  model = tiny.make_tokenizer(**fields)
  return jax.jit(model.init)(jax.random.key(0), tiny.images(1))['params']


@functools.cache
def _awake(**fields):
  init = tiny.make_tokenizer(**fields).init
  return tiny.noise_for(init, jax.random.key(0), tiny.images(1))['params']


@functools.cache
def _jitted(method, train, num_groups, fields):
  model = tiny.make_tokenizer(**dict(fields))
  options = {} if num_groups is None else {'num_groups': num_groups}
  if train:
    options['train'] = True

  @jax.jit
  def apply(params, inputs, key):
    rngs = {'groups': key} if train else None
    return model.apply(
      {'params': params}, inputs, method=method, rngs=rngs, **options
    )

  return apply


def _call(params, inputs, *, train=False, **fields):
  key = jax.random.key(7)
  return _jitted('__call__', train, None, tuple(fields.items()))(
    params, inputs, key
  )


def _encode(params, images, **fields):
  return _jitted('encode', False, None, tuple(fields.items()))(
    params, images, None
  )


def _decode(params, codes, num_groups=None, **fields):
  return _jitted('decode', False, num_groups, tuple(fields.items()))(
    params, codes, None
  )


def _baseline_params(params):
  """Returns those parameters of a full model that SoftVQ has too."""
  kept = {k: params[k] for k in ('encoder', 'quantizer_global', 'decoder')}

  def plain(tree):
    return {
      name: plain(value) if isinstance(value, dict) else value
      for name, value in tree.items()
      if not name.startswith(('cross', 'gate', 'context'))
    }

  return plain(kept)


@pytest.mark.slow
@pytest.mark.parametrize('fields', [{}, ONE_LOCAL], ids=['full', 'one_local'])
def test_fresh_model_is_the_softvq_baseline(fields):
  images, params = tiny.images(B), _fresh(**fields)
  base = _baseline_params(params)
  wanted = jax.tree.structure(_fresh(**SOFTVQ))
  assert jax.tree.structure(base) == wanted
  # Operation by operation: fusions of two programs would round differently.
  with jax.disable_jit():
    baseline = tiny.make_tokenizer(**SOFTVQ).apply({'params': base}, images)
    full = tiny.make_tokenizer(**fields).apply({'params': params}, images)
  np.testing.assert_array_equal(full.reconstruction, baseline.reconstruction)
  np.testing.assert_array_equal(full.codes, baseline.codes)
  # The gates and the fusion are what makes it so.
  opened = _call(_awake(**fields), images, **fields)
  awake = _call(_baseline_params(_awake(**fields)), images, **SOFTVQ)
  assert np.abs(opened.reconstruction - awake.reconstruction).max() > 1e-2


def test_groups_follow_the_fields():
  names = tiny.make_tokenizer().groups
  assert names == tokenizer.GROUPS == ('global', 'local1d', 'local2d')
  assert tiny.make_tokenizer(**SOFTVQ).groups == ('global',)
  assert tiny.make_tokenizer(local1d_width=0).groups == ('global', 'local2d')
  out = _call(_awake(), tiny.images(B))
  assert tuple(out.tokens) == tuple(out.quantized) == names
  assert out.reconstruction.shape == (B, 16, 16, 3)
  assert out.codes.shape == (B, 8, 4)
  np.testing.assert_array_equal(out.codes, out.tokens['global'])


def test_fusion_scalars_name_every_weight_and_gate():
  params = _awake()
  scalars = tiny.make_tokenizer().fusion_scalars(params)
  weights = params['fuse']['weights']
  gates = params['decoder']['blocks']['block']['gate1']
  assert len(scalars) == 3 + 2 * (1 + 2)
  assert scalars['fusion/weight_local1d'] == weights[1]
  np.testing.assert_allclose(
    scalars['fusion/weight_local2d'], 1 - sum(weights), rtol=1e-6
  )
  assert scalars['fusion/gate_local2d_1'] == gates[1]
  np.testing.assert_allclose(
    scalars['fusion/gate_local2d'], np.sqrt(np.mean(gates**2)), rtol=1e-6
  )
  alone = tiny.make_tokenizer(**SOFTVQ)
  assert not alone.fusion_scalars({'decoder': {'blocks': {'block': {}}}})


def test_unit_rms_is_what_everything_reads():
  images, params = tiny.images(B), _awake()
  codes = _encode(params, images)
  np.testing.assert_allclose(np.mean(codes**2, axis=-1), 1.0, rtol=1e-4)
  raw = _encode(params, images, unit_rms=False)
  assert np.abs(np.mean(raw**2, axis=-1) - 1).max() > 0.05
  np.testing.assert_allclose(
    raw / np.sqrt(np.mean(raw**2, -1, keepdims=True)), codes, atol=1e-4
  )


@pytest.mark.parametrize('mode', tokenizer.CHOICES['bootstrap_from'])
def test_encode_is_what_aligners_read_and_decode_takes(mode):
  images, params = tiny.images(B), _awake()
  out = _call(params, images, bootstrap_from=mode)
  codes = _encode(params, images, bootstrap_from=mode)
  np.testing.assert_allclose(codes, out.codes, atol=1e-5)
  expected = out.quantized['global'].codes
  if mode == 'continuous':
    expected = out.tokens['global']
  np.testing.assert_array_equal(out.codes, expected)
  fields = tiny.TOKENIZER
  projector = aligners.Projector(fields['token_dim'], fields['local1d_width'])
  np.testing.assert_allclose(
    jax.jit(projector.apply)({'params': params['local1d']}, out.codes),
    out.tokens['local1d'],
    atol=1e-5,
  )
  # Quantised a second time, codes would be others.
  images = _decode(params, codes, bootstrap_from=mode)
  np.testing.assert_allclose(images, out.reconstruction, atol=1e-4)


@pytest.mark.parametrize('mode', tokenizer.CHOICES['bootstrap_from'])
def test_local_groups_may_read_quantised_tokens_of_any_codes(mode):
  fields = {'bootstrap_from': mode, 'local_input': 'quantized'}
  images, params = tiny.images(B), _awake()
  out = _call(params, images, **fields)
  # What a generator models is as before.
  np.testing.assert_allclose(
    out.codes, _encode(params, images, bootstrap_from=mode), atol=1e-5
  )
  sizes = tiny.TOKENIZER
  projector = aligners.Projector(sizes['token_dim'], sizes['local1d_width'])
  read = jax.jit(projector.apply)(
    {'params': params['local1d']}, out.quantized['global'].codes
  )
  np.testing.assert_allclose(read, out.tokens['local1d'], atol=1e-5)
  model = tiny.make_tokenizer(**fields)
  alone = jax.jit(lambda p, c: model.apply(p, c, method='bootstrap'))(
    {'params': params}, out.codes
  )
  np.testing.assert_allclose(alone['local1d'], read, atol=1e-5)
  decoded = _decode(params, out.codes, **fields)
  np.testing.assert_allclose(decoded, out.reconstruction, atol=1e-4)


def test_quantized_codes_would_change_if_quantised_again():
  params = _awake()
  codes = _encode(params, tiny.images(B), bootstrap_from='quantized')
  once = _decode(params, codes, bootstrap_from='quantized')
  twice = _decode(params, codes, bootstrap_from='continuous')
  assert np.abs(once - twice).max() > 1e-2


def test_shared_codebooks_are_the_global_ones():
  params = _awake(share_codebooks=True)
  assert {k for k in _awake() if 'quantizer' in k} == {
    'quantizer_global',
    'quantizer_local1d',
    'quantizer_local2d',
  }
  assert {k for k in params if 'quantizer' in k} == {'quantizer_global'}
  out = _call(params, tiny.images(B), share_codebooks=True)
  same = _awake() | params
  for group in ('local1d', 'local2d'):
    same[f'quantizer_{group}'] = params['quantizer_global']
  own = _call(same, tiny.images(B))
  np.testing.assert_allclose(out.reconstruction, own.reconstruction, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'tokens', 'contexts'),
  [
    ({}, 8, 2),
    ({'fusion': 'concat'}, 24, 2),
    ({'cross_attend': 'all'}, 8, 3),
    ({'fusion': 'concat', 'cross_attend': 'all'}, 24, 3),
    ({'cross_attend': 'all'} | SOFTVQ, 8, 1),
  ],
)
def test_what_the_decoder_reads(fields, tokens, contexts):
  model = tiny.make_tokenizer(**fields)
  variables = jax.eval_shape(model.init, jax.random.key(0), tiny.images(2))
  params = variables['params']
  positions = params['decoder']['token_positions']
  assert positions.shape == (1, tokens, 16)
  block = params['decoder']['blocks']['block']
  assert sum(name.startswith('gate') for name in block) == contexts
  assert ('fuse' in params) == (model.fusion == 'residual' and contexts > 1)
  out = jax.eval_shape(
    lambda *inputs: model.apply(*inputs).reconstruction,
    variables,
    tiny.images(2),
  )
  assert out.shape == (2, 16, 16, 3)


def test_fused_tokens_come_in_through_cross_attention_too():
  images, fields = tiny.images(B), {'cross_attend': 'all'}
  params = jax.tree.map(lambda a: a, _awake(**fields))
  block = params['decoder']['blocks']['block']
  before = _call(params, images, **fields).reconstruction
  block['gate2'] = jnp.zeros_like(block['gate2'])
  after = _call(params, images, **fields).reconstruction
  assert np.abs(before - after).max() > 1e-3


def test_a_prefix_decodes_without_the_groups_behind_it():
  params = _awake()
  codes = _encode(params, tiny.images(B))
  every = [_decode(params, codes, num_groups=n) for n in (1, 2, 3)]
  np.testing.assert_allclose(every[2], _decode(params, codes), atol=1e-5)
  # Other local parameters change only what still reads them.
  other = {k: jax.tree.map(lambda a: a + 0.5, v) for k, v in params.items()}
  without_2d = params | {'local2d': other['local2d']}
  without_both = without_2d | {'local1d': other['local1d']}
  np.testing.assert_array_equal(
    _decode(without_both, codes, num_groups=1), every[0]
  )
  np.testing.assert_array_equal(
    _decode(without_2d, codes, num_groups=2), every[1]
  )
  for changed, index in ((without_both, 1), (without_2d, 2)):
    out = _decode(changed, codes, num_groups=index + 1)
    assert np.abs(out - every[index]).max() > 1e-3


def test_dropped_groups_give_the_prefix_decodings():
  batch, rate = 256, 0.6
  images, params = tiny.images(batch), _awake()
  codes = _encode(params, images)
  trained = _call(params, images, train=True, group_dropout=rate)
  prefixes = np.stack([_decode(params, codes, num_groups=n) for n in (1, 2, 3)])
  distance = np.abs(prefixes - trained.reconstruction[None])
  distance = distance.max(axis=(2, 3, 4))
  np.testing.assert_array_less(distance.min(axis=0), 1e-4)
  # No two prefixes decode alike, so the nearest one says what was dropped.
  assert np.sort(distance, axis=0)[1].min() > 1e-3
  share = np.bincount(distance.argmin(axis=0), minlength=3) / batch
  np.testing.assert_allclose(share, [rate / 2, rate / 2, 1 - rate], atol=0.1)


def test_groups_are_dropped_in_training_alone():
  images, params = tiny.images(B), _awake()
  always = _call(params, images, group_dropout=1.0).reconstruction
  never = _call(params, images).reconstruction
  np.testing.assert_array_equal(always, never)
  untouched = _call(params, images, train=True).reconstruction
  np.testing.assert_allclose(untouched, never, atol=1e-5)


def test_rectangles_go_in_and_come_out():
  model = tiny.make_tokenizer(image_size=(12, 20))
  model.check()
  images = jnp.zeros((2, 12, 20, 3))
  params = tiny.noise_for(model.init, jax.random.key(0), images)['params']
  # 3 rows and 5 columns, in either half.
  for half in ('encoder', 'decoder'):
    assert params[half]['patch_positions'].shape == (1, 15, 16)
  codes = jax.eval_shape(
    lambda p, x: model.apply({'params': p}, x, method='encode'), params, images
  )
  assert codes.shape == (2, 8, 4)
  decoded = jax.eval_shape(
    lambda p, x: model.apply({'params': p}, x, method='decode'), params, codes
  )
  assert decoded.shape == images.shape
  # Not the whole output, whose types are checked and say arrays.
  reconstruction = jax.eval_shape(
    lambda p, x: model.apply({'params': p}, x).reconstruction, params, images
  )
  assert reconstruction.shape == images.shape
  # All that depends on the size are the two tables.
  square = tiny.make_tokenizer()
  other = jax.eval_shape(square.init, jax.random.key(0), tiny.images(1))
  shapes, squares = (
    {jax.tree_util.keystr(k): v.shape for k, v in leaves}
    for leaves in map(
      jax.tree_util.tree_leaves_with_path, (params, other['params'])
    )
  )
  assert shapes.keys() == squares.keys()
  assert [k for k in shapes if shapes[k] != squares[k]] == [
    "['decoder']['patch_positions']",
    "['encoder']['patch_positions']",
  ]


@pytest.mark.slow
def test_remat_and_unroll_change_neither_values_nor_gradients():
  images, params = tiny.images(2), _awake()

  def run(**fields):
    model = tiny.make_tokenizer(**fields)

    def loss(params):
      out = model.apply({'params': params}, images)
      return jnp.mean(jnp.sin(out.reconstruction))

    return jax.jit(jax.value_and_grad(loss))(params)

  plain, other = run(), run(remat='dots', unroll=1)
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
  ('fields', 'named'),
  [({name: 'other'}, f'model.{name}') for name in tokenizer.CHOICES]
  + [
    ({'image_size': 18}, 'data.image_size'),
    ({'image_size': 0}, 'data.image_size'),
    ({'image_size': (18, 16)}, 'data.image_size=\\(18, 16\\) does not'),
    ({'image_size': (16, 18)}, 'data.image_size=\\(16, 18\\) does not'),
    ({'image_size': (16, 0)}, 'data.image_size'),
    ({'patch_size': 0}, 'model.patch_size'),
    ({'num_codebooks': 3}, 'model.num_codebooks'),
    ({'num_tokens': 0}, 'model.num_tokens'),
    ({'encoder_width': 20}, 'model.encoder_width'),
    ({'decoder_width': 20}, 'model.decoder_width'),
    ({'local2d_width': 20}, 'model.local2d_width'),
    ({'head_dim': 0}, 'model.head_dim'),
    ({'encoder_width': 18, 'head_dim': 2}, 'model.encoder_width'),
    ({'decoder_width': 18, 'head_dim': 2}, 'model.decoder_width'),
    ({'encoder_depth': 0}, 'model.encoder_depth=0; wanted 1 or more'),
    ({'decoder_depth': 0}, 'model.decoder_depth=0; wanted 1 or more'),
    ({'local1d_width': -1}, 'model.local1d_width=-1; wanted 0 or more'),
    ({'local2d_depth': -1}, 'model.local2d_depth=-1; wanted 0 or more'),
    ({'codebook_size': 0}, 'model.codebook_size=0; wanted 1 or more'),
    ({'unroll': -1}, 'model.unroll=-1; wanted 0 or more'),
    ({'remat': 'all'}, "model.remat='all'; wanted one of none, dots, block"),
    ({'mlp_ratio': 0.0}, 'model.mlp_ratio=0.0; wanted a number above 0'),
    ({'tau': 0.0}, 'model.tau=0.0; wanted a number above 0'),
    ({'assignment': 'l2'}, 'model.assignment=l2 with model.unit_rms=True'),
    ({'group_dropout': 2.0}, 'model.group_dropout=2.0; wanted a number from 0'),
  ],
)
def test_numbers_that_do_not_fit_are_named(fields, named):
  model = tiny.make_tokenizer(**fields)
  with pytest.raises(errors.ConfigError, match=named.replace('.', r'\.')):
    model.check()
  with pytest.raises(errors.ConfigError):
    jax.eval_shape(model.init, jax.random.key(0), tiny.images(1))


def test_the_tiny_model_passes_the_check():
  tiny.make_tokenizer().check()
  tiny.make_tokenizer(assignment='l2', unit_rms=False).check()


PARAMS = {
  'encoder': {'w': jnp.ones(2)},
  'local2d': {'w': jnp.ones(3)},
  'project_transport': {'w': jnp.ones(4)},
}


def test_heads_to_teachers_are_no_part_of_the_model():
  assert set(tokenizer.model_params(PARAMS)) == {'encoder', 'local2d'}


def test_split_cuts_every_module_once():
  trained, base = tokenizer.split_trainable(PARAMS, ('local2d',))
  assert set(trained) == {'local2d'}
  assert trained | base == PARAMS


@pytest.mark.parametrize(
  ('trainable', 'message'),
  [
    (('local2d', 'local3d'), 'the model has no local3d; wanted .*local2d'),
    ((), 'empty choice'),
  ],
)
def test_split_names_what_is_unknown(trainable, message):
  with pytest.raises(errors.ConfigError, match=message):
    tokenizer.split_trainable(PARAMS, trainable)


def test_served_are_the_means_over_what_was_never_trained():
  params = {'base': {'encoder': 1}, 'tokenizer': {'local2d': 2}}
  ema = {'tokenizer': {'local2d': 3, 'project_transport': 4}}
  assert tokenizer.served_params(params, ema) == {
    'encoder': 1,
    'local2d': 3,
  }
  del params['base']
  assert tokenizer.served_params(params, ema) == {'local2d': 3}
