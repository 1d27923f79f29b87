import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from selfboottok_jax import errors
from selfboottok_jax.training import processes


def _pretend(monkeypatch, *others):
  """Makes this process the first of several; `others` is what they send."""
  monkeypatch.setattr(jax, 'process_count', lambda: 1 + len(others))
  monkeypatch.setattr(
    multihost_utils,
    'process_allgather',
    lambda own: np.stack([own, *(np.asarray(other) for other in others)]),
  )


def test_one_process_passes_or_raises_its_own_error():
  with processes.all_or_none():
    pass
  with (
    pytest.raises(errors.ConfigError, match='mine'),
    processes.all_or_none(),
  ):
    raise errors.ConfigError('mine')


def test_the_failure_of_another_process_ends_this_one(monkeypatch):
  _pretend(monkeypatch, [False], [True])
  with (
    pytest.raises(errors.UserError, match='process 2 of 3 cannot go on'),
    processes.all_or_none(),
  ):
    pass


def test_the_own_error_is_raised_rather_than_the_note(monkeypatch):
  _pretend(monkeypatch, [True])
  with (
    pytest.raises(errors.ConfigError, match='mine'),
    processes.all_or_none(),
  ):
    raise errors.ConfigError('mine')


def test_a_fault_of_the_code_is_not_held_back(monkeypatch):
  _pretend(monkeypatch, [False])
  with pytest.raises(ZeroDivisionError), processes.all_or_none():
    raise ZeroDivisionError


@pytest.mark.parametrize('same', [True, False])
def test_values_of_the_processes_are_compared(monkeypatch, same):
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(
    multihost_utils,
    'process_allgather',
    lambda own: np.stack([own, own if same else own[::-1]]),
  )
  if same:
    processes.check_same('configs', 'a')
  else:
    with pytest.raises(errors.ConfigError, match='different configs'):
      processes.check_same('configs', 'a')


def test_alike_are_those_of_a_machine_with_the_same_value(monkeypatch):
  _pretend(monkeypatch, np.zeros(32, np.uint8))
  assert processes.count_alike('a') == 1
  monkeypatch.setattr(
    multihost_utils,
    'process_allgather',
    lambda own: np.stack([own, own[::-1], own]),
  )
  assert processes.count_alike('a') == 2
  sent = []
  monkeypatch.setattr(
    multihost_utils,
    'process_allgather',
    lambda own: (sent.append(own.tobytes()), np.stack([own, own]))[1],
  )
  for value, name in (('a', 'one'), ('a', 'two'), ('b', 'one')):
    monkeypatch.setattr(processes.platform, 'node', lambda name=name: name)
    assert processes.count_alike(value) == 2
  assert len(set(sent)) == 3


def test_a_process_alone_waits_for_nobody():
  assert processes.count_alike('a') == 1
  processes.check_same('configs', 'a')
  processes.meet('here')
