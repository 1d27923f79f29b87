import functools

import jax
import jax.numpy as jnp
import pytest

from selfboottok_jax import placement
from selfboottok_jax.evaluation import flops
from selfboottok_jax.models import layers, sit, transformer
from selfboottok_jax.training import sharding
from tests import tiny

M, K, N = 3, 5, 7


def _count(function, *args, components=()):
  return flops.count(jax.jit(function).trace(*args).jaxpr, components)


def _total(function, *args):
  return _count(function, *args)[flops.OTHER].total


def _zeros(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_product_is_two_operations_per_multiply_add():
  assert _total(jnp.dot, _zeros(M, K), _zeros(K, N)) == 2 * M * K * N
  batched = functools.partial(jnp.einsum, 'bij,bkj->bik')
  left, right = _zeros(4, M, K), _zeros(4, N, K)
  assert _total(batched, left, right) == 2 * 4 * M * K * N


def _padding(function, *args, tile=128):
  """Operations in whole tiles over those of the numbers."""
  jaxpr = jax.jit(function).trace(*args).jaxpr
  whole = flops.count_padded(jaxpr, ['mixed'], tile)
  assert whole.keys() == {'mixed', flops.OTHER}
  return sum(whole.values()) / _total(function, *args)


def test_tiles_that_products_do_not_fill_are_padded():
  fitting = _zeros(8, 128), _zeros(128, 256)
  assert _padding(jnp.dot, *fitting) == 1
  assert _padding(jnp.dot, *fitting, tile=256) == 2
  # 65 tokens of heads of 72: rows to 72, columns and features to 128.
  logits = functools.partial(jnp.einsum, 'bqhd,bkhd->bhqk')
  x = _zeros(2, 65, 4, 72)
  wanted = 72 * 128 * 128 / (65 * 65 * 72)
  assert _padding(logits, x, x) == pytest.approx(wanted)
  # A row of two numbers fills a tile as well on either side.
  assert _padding(jnp.dot, _zeros(128, 128), _zeros(128, 2)) == 4
  # All tokens of all images are rows of one matrix.
  assert _padding(jnp.dot, _zeros(2, 65, 128), _zeros(128, 128)) == 136 / 130
  scan = functools.partial(_scanned, jnp.eye(64))
  assert _padding(scan, _zeros(8, 64)) == 4


def _scanned(matrix, x):
  with jax.named_scope('mixed'):
    return jax.lax.scan(lambda x, _: (x @ matrix, None), x, None, length=3)[0]


def test_element_wise_work_is_not_counted():
  assert _total(lambda x: jnp.tanh(x).sum(), _zeros(M, K)) == 0


# On 8 pixels a window of 3 with padding meets 22 numbers a side, with stride 2
# 11; without padding 6 x 3, with stride 2 3 x 3.
CONVOLUTIONS = {
  'plain': ({}, (3, 3, 4, 6), 2 * 22**2 * 6 * 4),
  'strided': ({'window_strides': (2, 2)}, (3, 3, 4, 6), 2 * 11**2 * 6 * 4),
  'depthwise': ({'feature_group_count': 4}, (3, 3, 1, 4), 2 * 22**2 * 4),
  'unpadded': ({'padding': 'VALID'}, (3, 3, 4, 6), 2 * 18**2 * 6 * 4),
  'unpadded and strided': (
    {'padding': 'VALID', 'window_strides': (2, 2)},
    (3, 3, 4, 6),
    2 * 9**2 * 6 * 4,
  ),
  'spread': ({'rhs_dilation': (2, 2)}, (3, 3, 4, 6), 2 * 20**2 * 6 * 4),
}


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_a_convolution_multiplies_its_window_at_every_output(name):
  options, kernel, wanted = CONVOLUTIONS[name]
  options = {'window_strides': (1, 1), 'padding': 'SAME'} | options
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    **options,
  )
  image = _zeros(1, 8, 8, 4)
  assert _total(convolve, image, _zeros(*kernel)) == wanted

  def gradients(x, w):
    return jax.value_and_grad(lambda *a: convolve(*a).sum(), (0, 1))(x, w)

  # Each of the two gradients meets the numbers that the value does.
  assert _total(gradients, image, _zeros(*kernel)) == 3 * wanted


def test_loops_count_as_often_as_they_run():
  def looped(x, w):
    x = jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x)
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=6)[0]

  assert _total(looped, _zeros(M, K), _zeros(K, K)) == 11 * 2 * M * K * K


def test_of_two_branches_the_dearer_one_counts():
  def branch(flag, x, w):
    return jax.lax.cond(flag, lambda: x @ w @ w, lambda: x @ w)

  flag = jax.ShapeDtypeStruct((), bool)
  count = _total(branch, flag, _zeros(M, K), _zeros(K, K))
  assert count == 2 * 2 * M * K * K


def test_a_loop_of_unknown_length_is_refused():
  def halve(x, w):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ w, x)

  with pytest.raises(ValueError, match='unknown number of times'):
    _total(halve, _zeros(M, K), _zeros(K, K))
  quiet = functools.partial(jax.lax.while_loop, lambda x: x.sum() > 1, jnp.sin)
  assert _total(quiet, _zeros(M, K)) == 0


def test_products_belong_to_the_outermost_named_scope():
  def layered(x, w):
    with jax.named_scope('outer'), jax.named_scope('inner'):
      x = x @ w
    with jax.named_scope('inner'):
      x = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]
    return (x @ w).sum()

  one = 2.0 * M * K * K
  arguments = _zeros(M, K), _zeros(K, K)
  counted = _count(layered, *arguments, components=('outer', 'inner'))
  forward = {name: found.forward for name, found in counted.items()}
  assert forward == {'outer': one, 'inner': 3 * one, flops.OTHER: one}

  counted = _count(
    jax.grad(layered, 1), *arguments, components=('outer', 'inner')
  )
  # The first product has one gradient: its input is no parameter.
  backward = {name: found.backward for name, found in counted.items()}
  assert backward == {'outer': one, 'inner': 6 * one, flops.OTHER: 2 * one}
  assert all(found.recompute == 0 for found in counted.values())


def _sit_flops(**fields):
  model = sit.SiT(8, 4, 10, 16, 3, 2, **fields)
  inputs = _zeros(2, 8, 4), _zeros(2), jax.ShapeDtypeStruct((2,), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)

  def loss(params, *inputs):
    with jax.named_scope('generator'):
      return model.apply(params, *inputs).tokens.sum()

  program = jax.value_and_grad(loss)
  return _count(program, params, *inputs, components=('generator',))


def test_types_are_told_apart_and_add_up():
  def mixed(x, w):
    x = jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]
    with jax.named_scope('part'):
      half = x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)
      # The wider type decides.
      both = jnp.dot(half, w, precision='highest')
      return both + jnp.dot(x, w, precision='high')

  traced = jax.jit(mixed).trace(_zeros(M, K), _zeros(K, K))
  one = 2.0 * M * K * K
  assert flops.count_types(traced.jaxpr, ('part', 'absent')) == {
    'part': {
      'bfloat16': one, 'float32 highest': one, 'float32 high': one
    },
    'absent': {},
    flops.OTHER: {'float32': 3 * one},
  }  # fmt: skip
  named = functools.partial(jnp.dot, precision='BF16_BF16_F32_X3')
  traced = jax.jit(named).trace(_zeros(M, K), _zeros(K, K))
  found = flops.count_types(traced.jaxpr, ())
  assert found == {flops.OTHER: {'float32 high': one}}


def test_scanned_blocks_count_as_a_python_loop_over_them():
  depth, width = 3, 16
  stack = transformer.Stack(functools.partial(transformer.Block, 2), depth)
  x = _zeros(2, 8, width)
  params = jax.eval_shape(stack.init, jax.random.key(0), x)['params']

  def scanned(params, x):
    return stack.apply({'params': params}, x).sum()

  def looped(params, x):
    for index in range(depth):
      one = jax.tree.map(lambda leaf, i=index: leaf[i], params['block'])
      x = transformer.Block(2).apply({'params': one}, x)
    return x.sum()

  program = jax.value_and_grad(scanned, argnums=(0, 1))
  text = str(jax.make_jaxpr(program)(params, x))
  assert 'scan' in text
  of_scan = _count(program, params, x)
  program = jax.value_and_grad(looped, argnums=(0, 1))
  text = str(jax.make_jaxpr(program)(params, x))
  assert 'scan' not in text
  assert _count(program, params, x) == of_scan
  assert of_scan[flops.OTHER].backward == 2 * of_scan[flops.OTHER].forward > 0


def test_every_device_of_a_shard_map_counts():
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ('x',), axis_types=auto)
  split = jax.sharding.PartitionSpec('x')
  whole = jax.sharding.PartitionSpec()
  product = jax.shard_map(
    jnp.dot, mesh=mesh, in_specs=(split, whole), out_specs=split
  )
  assert _total(product, _zeros(16, K), _zeros(K, N)) == 2 * 16 * K * N


def test_each_row_of_a_ragged_product_meets_one_matrix():
  sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
  arguments = _zeros(12, K), _zeros(4, K, N), sizes
  assert _total(jax.lax.ragged_dot, *arguments) == 2 * 12 * K * N


def test_recomputation_is_told_apart_from_the_model():
  kept, recomputed = (_sit_flops(remat=r)['generator'] for r in (False, True))
  assert kept.model == recomputed.model
  assert kept.recompute == 0
  # The blocks, not the embeddings and the last layer.
  assert 0.8 * kept.forward < recomputed.recompute < kept.forward


def test_fused_attention_counts_as_the_plain_one(monkeypatch):
  # Its checks ask for a GPU; tracing needs none.
  kernels = 'jax._src.cudnn.fused_attention_stablehlo'
  monkeypatch.setattr(f'{kernels}.check_cudnn_version', lambda: 91000)
  monkeypatch.setattr(
    f'{kernels}.check_compute_capability', lambda *_, **__: True
  )
  counted = {}
  for implementation in ('xla', 'cudnn'):

    def loss(q, k, v, implementation=implementation):
      mixed = jax.nn.dot_product_attention(
        q, k, v, implementation=implementation
      )
      return mixed.astype(jnp.float32).sum()

    q, k = (
      jax.ShapeDtypeStruct((2, tokens, 4, 32), jnp.bfloat16)
      for tokens in (64, 128)
    )
    gradients = jax.value_and_grad(loss, (0, 1, 2))
    counted[implementation] = _count(gradients, q, k, k)[flops.OTHER]
  assert counted['cudnn'] == counted['xla']
  assert counted['xla'].forward == 2 * 2 * (2 * 4 * 64 * 128 * 32)


def test_attention_in_tiles_counts_without_its_padding():
  counted = {}
  for implementation in ('xla', 'splash'):

    def loss(q, k, v, implementation=implementation):
      mixed = layers.attend(q, k, v, implementation=implementation)
      return mixed.astype(jnp.float32).sum()

    q, k = (
      jax.ShapeDtypeStruct((8, tokens, 4, 32), jnp.bfloat16)
      for tokens in (65, 130)
    )
    gradients = jax.value_and_grad(loss, (0, 1, 2))
    with (
      placement.assume_platform('tpu'),
      jax.set_mesh(sharding.make_mesh()),
    ):
      counted[implementation] = _count(gradients, q, k, k)[flops.OTHER]
  assert counted['splash'].forward == counted['xla'].forward
  # The kernel's gradient begins with the products of each result and its own
  # gradient, which XLA's does not multiply.
  assert counted['splash'].recompute == counted['xla'].recompute == 0
  assert counted['splash'].backward == pytest.approx(
    counted['xla'].backward, rel=5e-3
  )
  assert counted['xla'].forward == 2 * 2 * (8 * 4 * 65 * 130 * 32)


def test_kept_attention_is_not_computed_again():
  block = functools.partial(transformer.Block, 2, dtype='bfloat16')
  x = jax.ShapeDtypeStruct((8, 257, 16), jnp.bfloat16)
  counted = {}
  for remat in ('none', 'dots', 'block'):
    stack = transformer.Stack(block, 3, remat, dtype='bfloat16')
    params = jax.eval_shape(stack.init, jax.random.key(0), x)

    def loss(params, x, stack=stack):
      return stack.apply(params, x).astype(jnp.float32).sum()

    with (
      placement.assume_platform('tpu'),
      jax.set_mesh(sharding.make_mesh(data=8, fsdp=1)),
    ):
      program = jax.value_and_grad(loss, argnums=(0, 1))
      assert 'splash_mha_dkv' in str(jax.make_jaxpr(program)(params, x))
      counted[remat] = _count(program, params, x)[flops.OTHER]
  assert counted['none'].model == counted['dots'].model
  assert counted['none'].recompute == counted['dots'].recompute == 0
  # All but the last product, whose result nobody reads again.
  share = counted['block'].recompute / counted['none'].forward
  assert 0.8 < share < 1


def test_a_kernel_that_shows_nothing_is_refused():
  call = jax.ffi.ffi_call('some_kernel', jax.ShapeDtypeStruct((M,), 'float32'))
  with pytest.raises(ValueError, match='ffi_call'):
    _total(call, _zeros(M))


def test_agrees_with_xla_on_a_program_without_loops():
  # Wide enough that products outweigh what is done per element.
  model = tiny.make_tokenizer(unroll=16, encoder_width=256, decoder_width=256)
  image = _zeros(2, model.image_size, model.image_size, 3)
  params = jax.eval_shape(model.init, jax.random.key(0), image)
  traced = jax.jit(model.apply).trace(params, image)
  ours = flops.count(traced.jaxpr, ())[flops.OTHER].total
  theirs = traced.lower().cost_analysis()['flops']
  # XLA also counts additions, and each softmax and norm.
  assert 0.9 < ours / theirs < 1.0
