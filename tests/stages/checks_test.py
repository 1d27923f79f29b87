import pytest

from selfboottok_jax import errors
from selfboottok_jax.stages import checks
from tests.launch import tiny


@pytest.mark.parametrize('task', ['tokenizer', 'scaling', 'generator'])
def test_presets_pass(task):
  checks.check(tiny.get_config(task))


@pytest.mark.parametrize(
  ('task', 'changes', 'message'),
  [
    ('tokenizer', {'task': 'painter'}, "task='painter'; wanted one of tok"),
    ('tokenizer', {'data.image_size': 0}, 'data.image_size=0; wanted pixels'),
    ('tokenizer', {'data.image_size': (16, 16, 3)}, 'or .* .height, width.'),
    ('tokenizer', {'train.steps': 0}, 'train.steps=0; wanted 1 or more'),
    ('tokenizer', {'train.seed': 2**31}, 'train.seed=.*; wanted 2147483647 or'),
    ('tokenizer', {'train.ema': 1.0}, 'train.ema=1.0; wanted .* below 1'),
    ('tokenizer', {'train.ema': float('nan')}, 'train.ema=nan'),
    ('tokenizer', {'loss.pixel': -1.0}, 'loss.pixel=-1.0; wanted 0 or more'),
    ('scaling', {'loss.kl_temperature': 0.0}, 'wanted a number above 0'),
    ('generator', {'loss.path': 'curved'}, "loss.path='curved'; wanted one of"),
    ('generator', {'sampling.guidance_low': 0.9}, 'guidance_low'),
    ('generator', {'init_from': '/nowhere'}, 'init_from=/nowhere is no run'),
    ('generator', {'model.attention': 'cudnn'}, 'attention=cudnn on cpu'),
  ],
)
def test_a_value_that_no_run_can_use_is_named(task, changes, message):
  config = tiny.get_config(task)
  config.update_from_flattened_dict(changes)
  with pytest.raises(errors.UserError, match=message):
    checks.check(config)
