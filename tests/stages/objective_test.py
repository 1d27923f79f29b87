import pytest

from selfboottok_jax import errors, pretrained
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


@pytest.mark.parametrize('term', ['repa_global', 'repa_local'])
@pytest.mark.parametrize(
  ('fields', 'proposed'),
  [
    ({}, '--config.model.num_tokens=6,'),
    # A divisor of 12 that 8 divides there is not, and 24 is far away.
    ({'num_codebooks': 8}, 'a multiple of 12 that model.num_codebooks=8 div'),
  ],
)
def test_tokens_that_pair_with_no_patches_name_the_key(term, fields, proposed):
  # 3 x 4 patches beside 8 tokens.
  model = tiny.make_tokenizer(image_size=(12, 16), **fields)
  network = pretrained.load_network('hog', patch_size=model.patch_size)
  for mode in ('repeat', 'pool'):
    goal = objective.Objective(repa_mode=mode)
    with pytest.raises(
      errors.ConfigError,
      match=f'model.num_tokens=8 .*12 patches of networks.{term}=hog in images '
      f'of 12x16.*set .*{proposed}.* --config.loss.repa_mode=global',
    ):
      objective.check_pairing(model, goal, term, network)
  either = objective.Objective(repa_mode='global')
  objective.check_pairing(model, either, term, network)
  fitting = tiny.make_tokenizer(image_size=(12, 16), num_tokens=6)
  objective.check_pairing(fitting, objective.Objective(), term, network)


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
