"""A trained tokenizer and a generator of its codes."""

import pytest

from selfboottok_jax import inference
from tests import tiny


@pytest.fixture(scope='session')
def tokenizer(runs):
  return inference.load_tokenizer(runs / 'tokenizer')


@pytest.fixture(scope='session')
def generator(runs, tokenizer):
  loaded = inference.load_generator(runs / 'generator', tokenizer=tokenizer)
  # Two updates teach nothing; awake, the label and the noise count.
  return loaded.with_params(tiny.awake(loaded.params), loaded.statistics)
