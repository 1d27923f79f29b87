import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import layers
from selfboottok_jax.stages import suite

# The whole of the tiny suite runs in tests/launch/benchmark_test.py.


def _use(monkeypatch, *entries):
  monkeypatch.setattr(suite, 'entries', lambda size: iter(entries))


def _entry(name, measure, group='steps'):
  return suite.Entry(group, name, measure)


@pytest.mark.parametrize('name', suite._CHECKS)
def test_checks_pass_here(name, monkeypatch):
  _use(monkeypatch, _entry(name, suite._CHECKS[name], 'correctness'))
  result = suite.run('tiny')
  (record,) = result['entries']
  assert result['ok'] is record['ok'] is True
  assert 0 < record['error'] <= record['bound']


def test_attention_that_is_slightly_off_is_found(monkeypatch):
  attend = layers.attend
  monkeypatch.setattr(
    layers, 'attend', lambda q, k, v, mask: attend(q * 1.2, k, v, mask)
  )
  name = 'attention_bfloat16_masked'
  _use(monkeypatch, _entry(name, suite._CHECKS[name], 'correctness'))
  result = suite.run('tiny')
  assert not result['ok']
  assert not result['entries'][0]['ok']


def test_operands_rounded_to_16_bits_do_not_pass_for_float32(monkeypatch):
  def rounded(features, dtype):
    layer = layers.nn.Dense(features, dtype=dtype)
    return _Rounding(layer)

  monkeypatch.setattr(layers, 'dense', rounded)
  record = suite._check_float32_products()
  assert record['error'] > 10 * record['bound']


class _Rounding:
  """A layer as TPUs compute it where nobody asks for precision."""

  def __init__(self, layer):
    self.init = layer.init
    self._layer = layer

  def apply(self, variables, x):
    narrow = x.astype(jnp.bfloat16).astype(jnp.float32)
    return self._layer.apply(variables, narrow)


def test_one_failure_does_not_end_the_suite(monkeypatch):
  def fail():
    raise RuntimeError('RESOURCE_EXHAUSTED: out of memory\nwith a long trace')

  seen = []
  _use(monkeypatch, _entry('big', fail), _entry('small', lambda: {'x': 1}))
  result = suite.run('tiny', on_record=seen.append)
  big, small = result['entries']
  assert big['failed'] == 'RuntimeError: RESOURCE_EXHAUSTED: out of memory'
  assert small['x'] == 1
  assert not result['ok']
  assert seen == result['entries']


def test_entries_that_did_not_begin_are_listed(monkeypatch):
  _use(monkeypatch, _entry('a', dict), _entry('b', dict))
  result = suite.run('tiny', seconds=-1.0)
  assert [r['name'] for r in result['entries']] == ['a', 'b']
  assert all('seconds were over' in r['skipped'] for r in result['entries'])


def test_groups_are_chosen_by_name(monkeypatch):
  _use(monkeypatch, _entry('a', dict), _entry('b', dict, 'encoding'))
  result = suite.run('tiny', only=['encoding'])
  assert [r['name'] for r in result['entries']] == ['b']
  with pytest.raises(errors.ConfigError, match="only='speed'.*encoding"):
    suite.run('tiny', only=['speed'])
  with pytest.raises(errors.ConfigError, match="size='huge'.*tiny"):
    suite.run('huge')


def test_every_size_has_every_group_and_unique_names():
  for size in suite.SIZES:
    entries = list(suite.entries(size))
    assert {entry.group for entry in entries} == set(suite.GROUPS)
    names = [(entry.group, entry.name) for entry in entries]
    assert len(set(names)) == len(names)


def test_float64_attention_is_that_of_finite_differences():
  rng = np.random.default_rng(0)
  q, k, v, cotangent = rng.normal(size=(4, 1, 4, 1, 3))
  mask = np.tril(np.ones((4, 4), bool))
  value, *gradients = suite._attention_in_float64(q, k, v, cotangent, mask)
  for index, gradient in enumerate(gradients):
    inputs = [q, k, v]
    step = np.zeros_like(q)
    step[0, 2, 0, 1] = 1e-6
    inputs[index] = inputs[index] + step
    moved = suite._attention_in_float64(*inputs, cotangent, mask)[0]
    slope = ((moved - value) * cotangent).sum() / 1e-6
    assert gradient[0, 2, 0, 1] == pytest.approx(slope, abs=1e-5)
