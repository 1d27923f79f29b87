import jax.numpy as jnp
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import tokenizer_params

PARAMS = {
  'encoder': {'w': jnp.ones(2)},
  'local2d': {'w': jnp.ones(3)},
  'project_transport': {'w': jnp.ones(4)},
}


def test_heads_to_teachers_are_no_part_of_the_model():
  assert set(tokenizer_params.model_params(PARAMS)) == {'encoder', 'local2d'}


def test_split_cuts_every_module_once():
  trained, base = tokenizer_params.split_trainable(PARAMS, ('local2d',))
  assert set(trained) == {'local2d'}
  assert trained | base == PARAMS


@pytest.mark.parametrize(
  ('trainable', 'message'),
  [
    (('local2d', 'local3d'), 'the model has no local3d; wanted .*local2d'),
    ((), 'empty choice'),
  ],
)
def test_split_names_what_is_unknown(trainable, message):
  with pytest.raises(errors.ConfigError, match=message):
    tokenizer_params.split_trainable(PARAMS, trainable)


def test_served_are_the_means_over_what_was_never_trained():
  params = {'base': {'encoder': 1}, 'tokenizer': {'local2d': 2}}
  ema = {'tokenizer': {'local2d': 3, 'project_transport': 4}}
  assert tokenizer_params.served_params(params, ema) == {
    'encoder': 1,
    'local2d': 3,
  }
  del params['base']
  assert tokenizer_params.served_params(params, ema) == {'local2d': 3}
