import pytest

from selfboottok_jax import errors
from selfboottok_jax.stages import objective
from tests import tiny

ALL = ('perceptual', 'repa_global', 'repa_local', 'transport')


@pytest.mark.parametrize(
  'name',
  ['pixel_kind', 'repa_mode', 'repa_input', 'repa_local_on', 'ot_loss'],
)
def test_unknown_choices(name):
  with pytest.raises(errors.ConfigError, match=f"loss.{name}='other'; wanted"):
    objective.Objective(**{name: 'other'})


@pytest.mark.parametrize(
  ('weights', 'model', 'left_out'),
  [
    ({}, {}, set()),
    ({'perceptual': 0.0}, {}, {'perceptual'}),
    ({'repa_global': 0.0}, {}, {'repa_global'}),
    ({'repa_local': 0.0}, {}, {'repa_local'}),
    ({'transport': 0.0}, {}, {'transport'}),
    ({'align': 0.0}, {}, {'repa_global', 'repa_local', 'transport'}),
    # A branch that the model lacks cannot be aligned.
    ({}, {'local2d_depth': 0}, {'transport'}),
    ({}, {'local1d_width': 0}, {'repa_local'}),
    ({'repa_local_on': 'local2d'}, {'local1d_width': 0}, set()),
    (
      {'repa_local_on': 'local2d'},
      {'local2d_depth': 0},
      {'repa_local', 'transport'},
    ),
  ],
)
def test_active_terms(weights, model, left_out):
  active = objective.active_terms(
    tiny.make_tokenizer(**model), objective.Objective(**weights)
  )
  assert set(active) == set(ALL) - left_out


@pytest.mark.parametrize(
  ('trainable', 'weights', 'terms'),
  [
    (('local2d', 'quantizer_local2d'), {}, {'transport'}),
    (('decoder',), {}, set()),
    (('local1d',), {}, {'repa_local'}),
    (('local2d',), {'repa_local_on': 'local2d'}, {'repa_local', 'transport'}),
    (('quantizer_local1d',), {}, set()),
    (('quantizer_local1d',), {'repa_input': 'quantized'}, {'repa_local'}),
    (('project_transport',), {}, {'transport'}),
  ],
)
def test_a_term_that_nothing_trained_can_change_is_left_out(
  trainable, weights, terms
):
  active = objective.active_terms(
    tiny.make_tokenizer(), objective.Objective(**weights), trainable
  )
  assert set(active) == {'perceptual'} | terms
