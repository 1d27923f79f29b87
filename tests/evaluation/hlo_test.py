import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from selfboottok_jax.evaluation import hlo

WIDTH, LAYERS, BATCH = 32, 5, 16


@functools.cache
def _mesh(data=2, fsdp=4):
  return jax.make_mesh(
    (data, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2
  )


def _shape(mesh, spec, *dims):
  return jax.ShapeDtypeStruct(
    dims, jnp.float32, sharding=NamedSharding(mesh, spec)
  )


def _program(function, *arguments, mesh, out=None):
  out = NamedSharding(mesh, P() if out is None else out)
  with jax.set_mesh(mesh):
    compiled = jax.jit(function, out_shardings=out).lower(*arguments).compile()
  return hlo.Program(compiled.as_text())


def _found(program, mesh, **options):
  found = program.collectives(dict(mesh.shape), **options)
  return {(c.kind, c.axes): (c.count, c.bytes) for c in found}


def _layers(x, weights):
  """A product with each matrix of a stack; each is gathered when it comes."""
  whole = NamedSharding(_mesh(), P())
  rows = NamedSharding(_mesh(), P(('data', 'fsdp')))

  def layer(x, w):
    w = jax.lax.with_sharding_constraint(w, whole)
    return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None

  return jax.lax.scan(layer, x, weights)[0]


def _inputs(mesh, *layers):
  x = _shape(mesh, P(('data', 'fsdp')), BATCH, WIDTH)
  weights = _shape(
    mesh, P(*(None,) * len(layers), 'fsdp'), *layers, WIDTH, WIDTH
  )
  return x, weights


# Each device has a quarter of a matrix, and receives the other three.
GATHERED = 4 * WIDTH**2 * 3 / 4


def test_a_gather_in_a_loop_counts_as_often_as_the_loop_runs():
  mesh = _mesh()
  rows = P(('data', 'fsdp'))
  program = _program(_layers, *_inputs(mesh, LAYERS), mesh=mesh, out=rows)
  assert _found(program, mesh) == {
    ('all-gather', ('fsdp',)): (LAYERS, LAYERS * GATHERED)
  }


def test_loops_in_loops_multiply():
  mesh = _mesh()

  def nested(x, weights):
    return jax.lax.scan(lambda x, w: (_layers(x, w), None), x, weights)[0]

  program = _program(
    nested, *_inputs(mesh, 3, LAYERS), mesh=mesh, out=P(('data', 'fsdp'))
  )
  times = 3 * LAYERS
  assert _found(program, mesh) == {
    ('all-gather', ('fsdp',)): (times, times * GATHERED)
  }


@pytest.mark.parametrize('axes', [('data',), ('fsdp',), ('data', 'fsdp')])
def test_a_sum_over_devices_knows_its_axes(axes):
  mesh = _mesh()
  size = int(np.prod([mesh.shape[axis] for axis in axes]))
  x = _shape(mesh, P(axes), 8 * size, WIDTH)
  program = _program(lambda x: x.sum(0), x, mesh=mesh)
  # Twice, to reduce and to gather: all but the own part of the vector.
  received = 2 * 4 * WIDTH * (size - 1) / size
  assert _found(program, mesh) == {('all-reduce', axes): (1, received)}


# As the partitioner leaves it, before anything is fused.
SCATTER = """
HloModule scatter
ENTRY %main (p: f32[16,32], at: s32[]) -> f32[2,32] {
  %p = f32[16,32]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %all = f32[16,32]{1,0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%sum
  %same = f32[16,32]{1,0} reshape(%all)
  ROOT %own = f32[2,32]{1,0} dynamic-slice(%same, %at, %zero), dynamic_slice_sizes={2,32}
}
"""  # noqa: E501


def test_a_sum_of_which_each_takes_its_part_is_a_scatter():
  mesh = {'fsdp': 8}
  received = 4 * 16 * 32 * 7 / 8
  kept = hlo.Program(SCATTER).collectives(mesh)
  assert kept == [hlo.Collective('all-reduce', ('fsdp',), 1, 2 * received)]
  found = hlo.Program(SCATTER).collectives(mesh, scatter=True)
  assert found == [hlo.Collective('reduce-scatter', ('fsdp',), 1, received)]
  # Whoever takes more than the own part needs the sum.
  more = SCATTER.replace('f32[2,32]', 'f32[4,32]')
  assert hlo.Program(more).collectives(mesh, scatter=True) == kept


TEXT = """
HloModule made_up

%condition (s: (s32[], f32[8])) -> pred[] {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] constant(LIMIT)
  ROOT %c = pred[] compare(%i, %n), direction=DIRECTION
}

%body (s.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  %one = s32[] constant(STEP)
  %next = s32[] add(%s.1#0, %one)
  %r = f32[8]{0:T(128)S(1)} all-reduce(%s.1#1), channel_id=1, replica_groups=GROUPS, use_global_device_ids=true, to_apply=%sum
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %r)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %zero = s32[] constant(FIRST)
  %copied = s32[] copy(%zero)
  %start = (s32[], f32[8]{0}) tuple(%copied, %p)
  %w = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %g = f32[8]{0} get-tuple-element(%w), index=1
}
"""  # noqa: E501


def _made_up(**changes):
  changes = {
    'LIMIT': 10, 'DIRECTION': 'LT', 'STEP': 1, 'FIRST': 0, 'GROUPS': '{{0,1}}'
  } | changes  # fmt: skip
  text = TEXT
  for name, value in changes.items():
    text = text.replace(name, str(value))
  return hlo.Program(text)


@pytest.mark.parametrize(
  ('changes', 'trips'),
  [
    ({}, 10),
    ({'FIRST': 4}, 6),
    ({'DIRECTION': 'LE'}, 11),
    ({'STEP': 3}, 4),
    ({'FIRST': 9, 'LIMIT': 0, 'STEP': -1, 'DIRECTION': 'GE'}, 10),
    ({'FIRST': 9, 'LIMIT': 0, 'STEP': -1, 'DIRECTION': 'GT'}, 9),
    ({'FIRST': 12}, 0),
    ({'STEP': -1}, None),
    ({'DIRECTION': 'NE'}, None),
  ],
)
def test_trips_of_a_loop_that_only_its_condition_tells(changes, trips):
  program = _made_up(**changes)
  loop = program.entry.instructions['w']
  assert program.trips(loop, program.entry) == trips


def test_a_collective_in_a_loop_of_unknown_length_is_refused():
  with pytest.raises(ValueError, match='unknown number of times'):
    _made_up(DIRECTION='NE').collectives({'data': 2})


@pytest.mark.parametrize(
  ('groups', 'axes'),
  [
    ('{{0,1,2,3},{4,5,6,7}}', ('fsdp',)),
    ('{{0,4},{1,5},{2,6},{3,7}}', ('data',)),
    ('{}', ('data', 'fsdp')),
    ('[2,4]<=[8]', ('fsdp',)),
    ('[4,2]<=[2,4]T(1,0)', ('data',)),
    ('[1,8]<=[8]', ('data', 'fsdp')),
    ("mesh['a'=2,'b'=4] {'b'}", ('fsdp',)),
    ("mesh['a'=2,'b'=4] {'a'}", ('data',)),
    ("mesh['a'=2,'b'=2,'c'=2] {'b','c'}", ('fsdp',)),
    ("mesh['a'=8] {'a'}", ('data', 'fsdp')),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ('fsdp',)),
    ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", ('data',)),
    ("mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", ('data',)),
  ],
)
def test_every_way_to_write_groups_of_devices(groups, axes):
  (found,) = _made_up(GROUPS=groups).collectives({'data': 2, 'fsdp': 4})
  assert found.axes == axes
  assert found.count == 10
  size = {('data',): 2, ('fsdp',): 4}.get(axes, 8)
  assert found.bytes == 10 * 2 * 32 * (size - 1) / size


def test_groups_of_one_device_exchange_nothing():
  assert _made_up(GROUPS='{{0},{1}}').collectives({'data': 2}) == []


def test_groups_of_an_unknown_form_are_refused():
  with pytest.raises(ValueError, match='unknown form'):
    _made_up(GROUPS='something').collectives({'data': 2})


CHAIN = """
HloModule chain
%first (a: f32[4]) -> f32[8] {
  %a = f32[4]{0} parameter(0)
  ROOT %g = f32[8]{0} all-gather(%a), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}, frontend_attributes={chain_id="1"}
}
%second (b: f32[4]) -> f32[8] {
  %b = f32[4]{0} parameter(0)
  ROOT %g.1 = f32[8]{0} all-gather(%b), channel_id=7, replica_groups=[1,2]<=[2], dimensions={0}, frontend_attributes={chain_id="1"}
}
ENTRY %main (p: f32[4]) -> f32[8] {
  %p = f32[4]{0} parameter(0)
  %start = f32[8]{0} fusion(%p), kind=kCustom, calls=%first
  ROOT %done = f32[8]{0} fusion(%p), kind=kCustom, calls=%second
}
"""  # noqa: E501


def test_a_gather_that_is_spread_over_fusions_is_one():
  assert hlo.Program(CHAIN).collectives({'fsdp': 2}) == [
    hlo.Collective('all-gather', ('fsdp',), 1, 16.0)
  ]
  apart = CHAIN.replace('channel_id=7, replica', 'channel_id=8, replica', 1)
  (found,) = hlo.Program(apart).collectives({'fsdp': 2})
  assert (found.count, found.bytes) == (2, 32.0)


# As a TPU's compiler writes a reduce-scatter of two arrays.
FUSED = """
HloModule fused
%all-reduce-scatter (a: f32[16], b: f32[16]) -> (f32[2], f32[2]) {
  %a = f32[16]{0:S(1)} parameter(0)
  %b = f32[16]{0:S(1)} parameter(1)
  %all = (f32[16]{0}, f32[16]{0}) all-reduce(%a, %b), channel_id=1, replica_groups=[1,8]<=[8], use_global_device_ids=true, to_apply=%sum
  %at = u32[] partition-id()
  %one = f32[16]{0} get-tuple-element(%all), index=0
  %own = f32[2]{0} dynamic-slice(%one, %at), dynamic_slice_sizes={2}
  %two = f32[16]{0} get-tuple-element(%all), index=1
  %more = f32[2]{0} dynamic-slice(%two, %at), dynamic_slice_sizes={2}
  ROOT %t = (f32[2]{0}, f32[2]{0}) tuple(%own, %more)
}
ENTRY %main (p: f32[16]) -> (f32[2], f32[2]) {
  %p = f32[16]{0} parameter(0)
  ROOT %f = (f32[2]{0}, f32[2]{0}) fusion(%p, %p), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


def test_a_sum_and_its_slice_in_one_fusion_are_a_scatter():
  received = 2 * 4 * 16 * 7 / 8
  assert hlo.Program(FUSED).collectives({'fsdp': 8}) == [
    hlo.Collective('reduce-scatter', ('fsdp',), 1, received)
  ]


def test_shapes_have_bytes_and_a_memory():
  program = _made_up()
  body = program.computations['body']
  (shape,) = body.instructions['r'].shapes
  assert shape == hlo.Shape('f32', (8,), 1)
  assert shape.bytes == 32
  assert hlo.Shape('bf16', (3, 5)).bytes == 30
  assert hlo.Shape('s4', (4,)).bytes == 2
  assert hlo.Shape('pred', ()).bytes == 1


def test_other_text_is_refused():
  with pytest.raises(ValueError, match='no HLO program'):
    hlo.Program('module @jit_f {}')
