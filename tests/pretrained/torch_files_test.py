"""What needs no torch; reading its files is in tests/parity."""

import sys
import types
import zipfile

import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.pretrained import torch_files

A, B, C = ({'w': np.full(2, value)} for value in (1, 2, 3))


def _take(value, part=''):
  return torch_files.state_dict(value, 'some.ckpt', part)


def _message(value, part=''):
  with pytest.raises(errors.WeightsError) as caught:
    _take(value, part)
  assert 'some.ckpt' in str(caught.value)
  return str(caught.value)


def test_a_plain_state_dict_without_its_other_entries():
  assert _take({**A, 'epoch': 3, 'name': 'x', 'options': {'lr': 1}}) == A


@pytest.mark.parametrize(
  ('value', 'wanted'),
  [
    ({'state_dict': A, 'epoch': 3}, A),
    ({'model': A, 'ema': B, 'optimizer': {'state': {0: C}}}, B),
    ({'model': A, 'state_dict': B}, B),
    ({'student': A, 'teacher': B}, B),
    ({'encoder': A, 'target_encoder': B}, B),
    ({'ema': {'module': B, 'step': 3}, 'model': A}, B),
    ({'anything': A, 'epoch': 3}, A),
    # No arrays under the name that would come first.
    ({'ema': {'decay': 0.999}, 'model': A}, A),
    ({'ema': None, 'model': A}, A),
  ],
)
def test_the_state_dict_of_a_checkpoint(value, wanted):
  assert _take(value) == wanted


def test_another_part_by_name():
  value = {'model': A, 'ema': B, 'discriminator': C}
  assert _take(value, 'model') == A
  assert _take(value, 'discriminator') == C
  assert 'model, ema, discriminator' in _message(value, 'generator')


@pytest.mark.parametrize(
  ('value', 'said'),
  [
    ({'generator': A, 'discriminator': B}, 'generator, discriminator'),
    ({'epoch': 3}, 'no arrays'),
    ([1, 2], 'no arrays'),
    ({}, 'no arrays'),
  ],
)
def test_nothing_or_too_much_to_choose_from(value, said):
  assert said in _message(value)


def test_wrappers_of_training_are_removed():
  wrapped = {'module._orig_mod.module.w': A['w'], 'module._orig_mod.b': B['w']}
  assert _take({'model': wrapped}).keys() == {'module.w', 'b'}
  mixed = {'module.w': A['w'], 'b': B['w']}
  assert _take(mixed).keys() == mixed.keys()


def _archive(path):
  """A zip that has what makes it torch's."""
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('archive/data.pkl', b'\x80\x02}.')
  return path


def test_without_torch_it_says_how_to_convert(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  path = _archive(tmp_path / 'a.pth')
  with pytest.raises(errors.WeightsError) as caught:
    torch_files.read(path)
  for part in (str(path), 'pip install torch', 'python -m launch.convert'):
    assert part in str(caught.value)
  assert '\n' not in str(caught.value)


def test_a_torch_that_could_be_tricked_is_not_used(tmp_path, monkeypatch):
  old = types.SimpleNamespace(__version__='2.5.1+cpu')
  monkeypatch.setitem(sys.modules, 'torch', old)
  with pytest.raises(errors.WeightsError, match=r'torch 2\.5\.1.*torch>=2\.6'):
    torch_files.read(_archive(tmp_path / 'a.pth'))
