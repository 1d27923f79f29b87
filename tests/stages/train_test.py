import contextlib
import re

import numpy as np
import pytest

import selfboottok_jax as sbt
from selfboottok_jax import errors
from selfboottok_jax.stages import train
from tests.launch import commands, logs, tiny


def test_trains_from_python_and_the_run_is_loaded(tmp_path):
  config = tiny.get_config('tokenizer')
  config.data.batch_size = config.evaluation.batch_size = 8
  state = sbt.train(config, tmp_path / 'tok')
  assert int(state.step) == config.train.steps
  _check_log(tmp_path / 'tok', config)
  tokenizer = sbt.load_tokenizer(tmp_path / 'tok')
  codes = tokenizer.encode(np.zeros((2, 16, 16, 3), np.uint8))
  assert codes.shape == (2, tokenizer.num_tokens, tokenizer.token_dim)
  assert tokenizer.decode(codes).shape == (2, 16, 16, 3)


WATCHED = {
  *('train/psnr', 'discriminator_loss', 'critic/consistency'),
  *('critic/logits_real', 'critic/accuracy_fake', 'fusion/weight_local2d'),
  *('fusion/gate_local1d_0', 'transport/plan_spread', 'transport/converged'),
}


def _undocumented(record):
  """Names that docs/watching.md does not explain."""
  text = (commands.ROOT / 'docs' / 'watching.md').read_text()
  tags = '|'.join(
    # A part in capitals, as GROUP, stands for any name.
    re.sub(r'(?<![a-z])[A-Z]+', r'[a-z0-9_]+', tag)
    for tag in re.findall(r'`([a-z][\w/]*)`', text)
  )
  return [n for n in record if n != 'step' and not re.fullmatch(tags, n)]


def _check_log(workdir, config):
  """Every term is there, and they add up to the loss."""
  weights = dict(config.loss)
  for name in ('repa_global', 'repa_local', 'transport'):
    weights[name] *= config.loss.align
  # Here without a warm-up of the perceptual weight.
  terms = ('pixel', 'perceptual', 'adversarial', 'kl')
  terms += ('repa_global', 'repa_local', 'transport')
  updates = [r for r in logs.read(workdir) if 'loss' in r]
  assert [r['step'] for r in updates] == [1, 2]
  for values in updates:
    assert {f'loss/{name}' for name in terms} | WATCHED <= set(values)
    assert all(np.isfinite(v) for v in values.values())
    total = sum(weights[name] * values[f'loss/{name}'] for name in terms)
    np.testing.assert_allclose(values['loss'], total, rtol=1e-4)
  assert not {name for r in logs.read(workdir) for name in _undocumented(r)}
  # The critic has learnt something of the first batch.
  name = 'loss/adversarial'
  assert updates[0][name] != updates[1][name]


def test_nothing_is_written_where_a_value_is_wrong(tmp_path):
  config = tiny.get_config('tokenizer')
  config.train.steps = 0
  with pytest.raises(errors.ConfigError, match='train.steps=0'):
    sbt.train(config, tmp_path / 'tok')
  assert not (tmp_path / 'tok').exists()


def test_a_stage_that_cannot_be_built_stops_all_processes(
  monkeypatch, tmp_path
):
  # Outside of such a block the others would wait for this one for ever.
  inside = []

  @contextlib.contextmanager
  def all_or_none():
    inside.append(True)
    try:
      yield
    finally:
      inside.pop()

  def build(*unused):
    raise errors.WeightsError('inside' if inside else 'outside')

  monkeypatch.setattr(train.processes, 'all_or_none', all_or_none)
  monkeypatch.setitem(train.STAGES, 'tokenizer', build)
  config = tiny.get_config('tokenizer')
  config.data.batch_size = config.evaluation.batch_size = 8
  with pytest.raises(errors.WeightsError, match='inside'):
    train.train(config, tmp_path / 'tok')
