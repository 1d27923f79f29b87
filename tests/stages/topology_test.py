import importlib.util
import os
import sys

import jax
import pytest

from selfboottok_jax import errors
from selfboottok_jax.stages import topology


@pytest.mark.parametrize(
  ('name', 'chips', 'devices'),
  [
    ('v4:2x2x4', 16, 16),
    ('v5e:4x4', 16, 16),
    ('v5p:4x4x4', 64, 64),
    ('v6e:8x8', 64, 64),
    ('tpu7x:2x2x1', 4, 8),
    ('h100:8', 8, 8),
    ('h200:16', 16, 16),
  ],
)
def test_sizes(name, chips, devices):
  found = topology.parse(name)
  assert (found.size, found.num_devices) == (chips, devices)
  assert found.emulated == name.startswith('h')


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('v9:2x2', ("no chip 'v9'", 'v5p')),
    ('h100', ('h100', '1 to 8')),
    ('v5p:4x4', ("no slice '4x4' of v5p", 'v5p:4x4x4')),
    ('v5e:', ("no slice '' of v5e", 'v5e:4x4')),
    ('v5e:3x3', ('v5e:2x2',)),
    ('h100:0', ('1 to 8',)),
    ('h100:12', ('multiple of 8',)),
    ('h100:2048', ('1,024',)),
    ('h100:eight', ("'eight' is no number",)),
  ],
)
def test_unknown_hardware_is_refused_with_what_there_is(name, words):
  with pytest.raises(errors.ConfigError) as error:
    topology.parse(name)
  for word in words:
    assert word in str(error.value)


def test_tpus_need_their_compiler(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(errors.ConfigError, match=r'selfboottok_jax\[tpu\]'):
    topology.require_compiler(topology.parse('v5e:2x2'))
  topology.require_compiler(topology.parse('h100:8'))


def _refuse():
  raise errors.DataError('nothing to see')


def _end():
  sys.stderr.write('one\ntwo\n')
  sys.exit(3)


@pytest.mark.slow
def test_errors_come_back():
  where = topology.parse('h100:1')
  with pytest.raises(errors.DataError, match='nothing to see'):
    topology.call(where, _refuse)
  with pytest.raises(RuntimeError, match='code 3:\none\ntwo'):
    topology.call(where, _end)


def _compile(where):
  mesh = jax.make_mesh((where.num_devices,), ('x',), devices=where.devices())
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('x'))
  shape = jax.ShapeDtypeStruct((8, 4), 'float32', sharding=split)

  def step_fn(x):
    return x.sum(0)

  with topology.partitioned() as found:
    compiled = jax.jit(step_fn).lower(shape).compile()
  return found, compiled.as_text(), os.getpid()


def test_a_process_of_its_own_catches_the_partitioned_program():
  where = topology.parse('h100:2')
  (text,), _, pid = topology.call(where, _compile, where)
  assert pid != os.getpid()
  # Split, and neither fused nor scheduled yet.
  assert 'f32[4,4]' in text
  assert 'all-reduce(' in text
  assert 'fusion(' not in text


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu, of the extra `tpu`, is not installed',
)
@pytest.mark.parametrize('name', ['v4:2x2x1', 'v5e:2x2', 'tpu7x:2x2x1'])
def test_compiles_for_tpus_that_are_not_there(name):
  where = topology.parse(name)
  found, text, _ = topology.call(where, _compile, where)
  assert not found
  assert 'is_scheduled=true' in text
