import json

import pytest

from configs import evaluate
from selfboottok_jax import errors
from selfboottok_jax.stages import score

# Whole runs are scored in tests/launch/evaluate_test.py.


@pytest.mark.parametrize(
  ('tokenizer', 'changes', 'wanted'),
  [
    ('', {}, '--tokenizer not given'),
    ('TOK', {'num_samples': 1}, 'num_samples=1; wanted 2 or more'),
    ('TOK', {'guidance_scales': (1.0, 'x')}, 'guidance_scales='),
    ('TOK', {'guidance_scales': (float('inf'),)}, 'wanted numbers'),
  ],
)
def test_a_generator_is_refused_before_anything_is_loaded(
  tmp_path, tokenizer, changes, wanted
):
  (tmp_path / 'config.json').write_text(json.dumps({'task': 'generator'}))
  config = evaluate.get_config()
  for name, value in changes.items():
    config[name] = value
  with pytest.raises(errors.ConfigError, match=wanted):
    score.score_run(config, str(tmp_path), tokenizer)
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']


def test_a_folder_that_is_no_run(tmp_path):
  with pytest.raises(errors.UserError, match='is no run'):
    score.score_run(evaluate.get_config(), str(tmp_path / 'absent'))
