import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from selfboottok_jax.evaluation import flops, hardware, hlo, roofline
from selfboottok_jax.models import transformer

CHIP = hardware.CHIPS['v5e']
M, K, N = 24, 32, 40


def _zeros(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _unoptimized(function, *arguments):
  lowered = jax.jit(function).lower(*arguments)
  return hlo.Program(lowered.as_text(dialect='hlo'))


def _compiled(function, *arguments):
  return hlo.Program(jax.jit(function).lower(*arguments).compile().as_text())


def _flops(work):
  total = {}
  for one in work:
    for kind, amount in one.flops.items():
      total[kind] = total.get(kind, 0) + amount
  return total


def test_a_product_reads_its_factors_and_writes_its_result():
  a, b = _zeros(M, K, dtype=jnp.bfloat16), _zeros(K, N, dtype=jnp.bfloat16)
  (work,) = roofline.traced_work(_unoptimized(jnp.dot, a, b))
  assert work.flops == {'bfloat16': 2 * M * K * N}
  assert work.bytes == 2 * (M * K + K * N + M * N)


def test_precision_is_part_of_the_type():
  for name in ('high', 'highest'):
    product = functools.partial(jnp.dot, precision=name)
    (work,) = roofline.traced_work(
      _unoptimized(product, _zeros(M, K), _zeros(K, N))
    )
    assert work.flops == {f'float32 {name}': 2 * M * K * N}


def test_a_scan_counts_as_the_loop_that_it_stands_for():
  def scanned(x, w):
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=6)[0]

  def looped(x, w):
    for _ in range(6):
      x = x @ w
    return x

  for make, count in (
    (_unoptimized, roofline.traced_work),
    (_compiled, roofline.compiled_work),
  ):
    one, other = (
      count(make(f, _zeros(M, K), _zeros(K, K))) for f in (scanned, looped)
    )
    assert _flops(one) == _flops(other) == {'float32': 6 * 2 * M * K * K}
    assert {work.times for work in one if work.flops} == {6}


CONVOLUTIONS = {
  'plain': {},
  'strided': {'window_strides': (2, 2)},
  'unpadded': {'padding': 'VALID'},
  'spread': {'rhs_dilation': (2, 2)},
  'grouped': {'feature_group_count': 4},
}


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_convolutions_and_their_gradients_agree_with_the_trace(name):
  options = {'window_strides': (1, 1), 'padding': 'SAME'} | CONVOLUTIONS[name]
  groups = options.get('feature_group_count', 1)
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    **options,
  )

  def gradients(x, w):
    return jax.value_and_grad(lambda *a: convolve(*a).sum(), (0, 1))(x, w)

  arguments = _zeros(2, 8, 8, 4), _zeros(3, 3, 4 // groups, 4)
  traced = jax.jit(gradients).trace(*arguments)
  wanted = flops.count(traced.jaxpr, ())[flops.OTHER].total
  program = hlo.Program(traced.lower().as_text(dialect='hlo'))
  assert _flops(roofline.traced_work(program)) == {'float32': wanted}


def test_a_stack_of_blocks_with_gradients_agrees_with_the_trace():
  block = functools.partial(transformer.Block, 2, dtype='bfloat16')
  stack = transformer.Stack(block, 3, remat=True)
  x = _zeros(2, 8, 16, dtype=jnp.bfloat16)
  params = jax.eval_shape(stack.init, jax.random.key(0), x)['params']

  def loss(params, x):
    return stack.apply({'params': params}, x).astype(jnp.float32).sum()

  traced = jax.jit(jax.value_and_grad(loss)).trace(params, x)
  types = flops.count_types(traced.jaxpr, ())[flops.OTHER]
  program = hlo.Program(traced.lower().as_text(dialect='hlo'))
  assert _flops(roofline.traced_work(program)) == types
  assert types['bfloat16'] > 0


# A fusion takes one slice of a stack of weights and changes one slice of a
# buffer; `kept` lies in a core's own memory.
TEXT = """
HloModule made_up

%fused (w: bf16[5,8,16], i: s32[], kept: bf16[8,16], all: bf16[5,8,16]) -> bf16[5,8,16] {
  %w = bf16[5,8,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %kept = bf16[8,16]{1,0} parameter(2)
  %all = bf16[5,8,16]{2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %row = bf16[1,8,16]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %flat = bf16[8,16]{1,0} bitcast(%row)
  %sum = bf16[8,16]{1,0} add(%flat, %kept)
  %new = bf16[1,8,16]{2,1,0} bitcast(%sum)
  ROOT %put = bf16[5,8,16]{2,1,0} dynamic-update-slice(%all, %new, %i, %zero, %zero)
}

ENTRY %main (w.1: bf16[5,8,16], all.1: bf16[5,8,16]) -> bf16[5,8,16] {
  %w.1 = bf16[5,8,16]{2,1,0} parameter(0)
  %all.1 = bf16[5,8,16]{2,1,0} parameter(1)
  %i.1 = s32[] constant(2)
  %b = bf16[] constant(1)
  %k = bf16[8,16]{1,0:S(1)} broadcast(%b), dimensions={}
  ROOT %f = bf16[5,8,16]{2,1,0} fusion(%w.1, %i.1, %k, %all.1), kind=kLoop, calls=%fused
}
"""  # noqa: E501


def test_a_fusion_moves_only_the_slices_that_it_touches():
  work = roofline.compiled_work(hlo.Program(TEXT))
  row, index, number = 2 * 8 * 16, 4, 2
  # The broadcast reads a number; what it writes stays in the core.
  assert [one.bytes for one in work] == [number, row + index + row]


KERNELS = """
HloModule kernels
ENTRY %main (q: bf16[2,3,384,64], k: bf16[2,3,128,64]) -> bf16[2,3,384,64] {
  %q = bf16[2,3,384,64]{3,2,1,0} parameter(0)
  %k = bf16[2,3,128,64]{3,2,1,0} parameter(1)
  %m = s8[1,1,1]{2,1,0} constant({ { {1} } })
  %splash_mha_fwd_residuals.1 = bf16[2,3,384,64]{3,2,1,0} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={

}}, metadata={op_name="step/attn/splash"}
  %other.1 = bf16[2,3,384,64]{3,2,1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call"
  ROOT %splash_mha_dkv_no_residuals.1 = bf16[2,3,384,64]{3,2,1,0} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_attention_in_tiles_multiplies_its_padding_too():
  work = roofline.compiled_work(hlo.Program(KERNELS))
  assert work[0].scope == 'step/attn/splash'
  product = 2 * 2 * 3 * 384 * 128 * 64
  assert [one.flops for one in work] == [
    {'bfloat16': 2 * product},
    {},
    {'bfloat16': 5 * product},
  ]


AHEAD = """
HloModule ahead
ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0} parameter(0)
  %s = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[64]{0:S(1)} copy-done(%s)
  ROOT %n = f32[64]{0} negate(%d)
}
"""


def test_what_is_fetched_ahead_flows_beside_the_rest():
  work = roofline.compiled_work(hlo.Program(AHEAD))
  assert [(one.bytes, one.ahead) for one in work] == [(256, True), (256, False)]
  bound = roofline.estimate(work, [], CHIP, {})
  assert bound.memory == 256 / CHIP.bandwidth
  assert bound.fetches == bound.seconds == 512 / CHIP.bandwidth


def _work(kind='bfloat16', operations=0.0, moved=0.0):
  return roofline.Work('', {kind: operations}, moved)


def test_each_instruction_is_bound_by_its_slower_side():
  work = [
    _work(operations=3 * CHIP.peak),
    _work(moved=2 * CHIP.bandwidth, operations=CHIP.peak),
  ]
  bound = roofline.estimate(work, [], CHIP, {})
  assert (bound.arithmetic, bound.memory, bound.links) == (3, 2, 0)
  assert bound.seconds == 5
  assert bound.bound_by == 'arithmetic'
  precise = [_work('float32 highest', operations=CHIP.peak)]
  assert roofline.estimate(precise, [], CHIP, {}).seconds == pytest.approx(6)


def test_links_bound_what_they_carry_longer_than_the_rest_takes():
  moved = [hlo.Collective('all-gather', ('fsdp',), 1, 2 * CHIP.link)]
  work = [_work(operations=CHIP.peak)]
  bound = roofline.estimate(work, moved, CHIP, {'fsdp': 16})
  assert (bound.seconds, bound.bound_by) == (2, 'links')


def test_a_device_is_its_part_of_a_chip():
  chip = hardware.CHIPS['tpu7x']
  work = [_work(operations=chip.peak / 2, moved=chip.bandwidth / 4)]
  assert roofline.estimate(work, [], chip, {}).seconds == 1


def test_gpus_of_other_machines_are_reached_over_the_network():
  chip = hardware.CHIPS['h100']
  moved = hlo.Collective('all-gather', ('fsdp',), 1, chip.link)
  inside = roofline.link_seconds(moved, chip, {'data': 2, 'fsdp': 8})
  assert inside == 1
  # 8 of 16 stand elsewhere: 8 of the 15 shares that each receives, fetched by
  # 8 neighbours together.
  across = roofline.link_seconds(moved, chip, {'data': 1, 'fsdp': 16})
  assert across == pytest.approx(max(1, 8 / 15 / 8 * chip.link / chip.network))
  # Groups with one member in each machine have no neighbour to share with.
  apart = hlo.Collective('all-reduce', ('data',), 1, chip.network)
  mesh = {'data': 2, 'fsdp': 8}
  assert roofline.link_seconds(apart, chip, mesh) == pytest.approx(1)


def test_the_least_that_sharded_weights_need():
  auto = (AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 4), ('data', 'fsdp'), axis_types=auto)

  def shape(*spec):
    where = NamedSharding(mesh, P(*spec))
    return jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=where)

  def least(trained, frozen=()):
    return roofline.least_moved(trained, frozen, size=2, devices=8)

  whole = 2 * 16 * 16
  # Gathered twice and scattered; a quarter of the gradient is summed over two.
  assert least([shape(None, 'fsdp')]) == 3 * whole * 3 / 4 + whole / 4
  # Repeated: the gradient is summed over all.
  assert least([shape()]) == 2 * whole * 7 / 8
  assert least([shape(('data', 'fsdp'))]) == 3 * whole * 7 / 8
  assert least([], [shape('fsdp'), shape()]) == whole * 3 / 4


def test_a_product_in_a_loop_of_unknown_length_is_refused():
  def halve(x, w):
    return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ w, x)

  program = _unoptimized(halve, _zeros(M, K), _zeros(K, K))
  with pytest.raises(ValueError, match='unknown length'):
    roofline.traced_work(program)
