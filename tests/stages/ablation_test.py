import pytest

from selfboottok_jax import errors, trees
from selfboottok_jax.presets import ablations
from selfboottok_jax.stages import ablation
from tests import tiny

SMALL = ablation.Settings('photos64', more_data='more')
FAST = [row for row in ablations.ROWS if not row.decoder_like]


def _plan(path, settings=SMALL):
  return ablation.plan(ablations.find(path), settings)


@pytest.mark.parametrize('base', ablations.BASES)
def test_every_row_is_what_it_says_at_every_base(base):
  settings = ablation.Settings(base, more_data='more')
  for row in FAST:
    plan = ablation.plan(row, settings)
    assert tuple(t.stage for t in plan.trainings) == row.stages, row.path
    for training, changes in (
      (plan.tokenizer, row.tokenizer),
      (plan.scaling, row.scaling),
      (plan.generator, row.generator or {}),
    ):
      if training is not None:
        config = trees.flatten(training.config.to_dict())
        assert config.items() >= changes.items(), row.path
    plan.tokenizer.model.check()
    plan.scored.model.check()


def test_every_row_passes_the_checks_of_its_trainings(photos):
  settings = ablation.Settings('photos64', more_data=str(photos))
  ablation.check([ablation.plan(row, settings) for row in FAST])


def test_the_first_misfit_names_its_row():
  settings = ablation.Settings('photos64', {'model.patch_size': 7})
  plans = [_plan('figure5/g', settings)]
  with pytest.raises(errors.ConfigError, match='^figure5/g: data.image_size'):
    ablation.check(plans)


def test_equal_trainings_are_one():
  plans = [_plan(row.path) for row in FAST if row.table == 'figure6']
  assert len({plan.tokenizer for plan in plans}) == 1
  assert len({plan.generator for plan in plans}) == 1
  assert len({plan.scaling for plan in plans}) == len(plans) == 5
  assert _plan('figure6/600m').trainings == _plan('table3/full').trainings
  # A key that has the preset's value changes nothing.
  large = ablation.Settings('imagenet256')
  ijepa = _plan('table2/ijepa', large).tokenizer
  assert ijepa == _plan('table3/full', large).tokenizer
  assert _plan('table2/dinov2', large).tokenizer != ijepa


def test_names_do_not_depend_on_the_choice_of_rows():
  plans = [_plan('figure6/100m'), _plan('table3/g_l1')]
  named = ablation.name_trainings(plans, SMALL)
  assert set(named.values()) == {
    *('table3_full_tokenizer', 'table3_full_generator'),
    *('figure6_100m_scaling', 'table3_g_l1_tokenizer'),
    'table3_g_l1_generator',
  }


def test_steps_are_multiplied_unless_they_are_given():
  settings = ablation.Settings(
    'photos64', {'generator.train.steps': 7}, budget=0.01
  )
  plan = _plan('table3/full', settings)
  assert [t.config.train.steps for t in plan.trainings] == [30, 30, 7]


def test_a_change_goes_to_the_stages_that_have_the_key():
  settings = ablation.Settings(
    'photos64', {'train.ema': 0.5, 'scaling.train.ema': 0.6, 'loss.cls': 0.1}
  )
  plan = _plan('table3/full', settings)
  assert [t.config.train.ema for t in plan.trainings] == [0.5, 0.6, 0.5]
  assert plan.generator.config.loss.cls == 0.1


@pytest.mark.parametrize('key', ['train.seed', 'generator.tokenizer', 'task'])
def test_what_rows_decide_cannot_be_changed_for_all(key):
  with pytest.raises(errors.ConfigError, match='cannot be set for all rows'):
    ablation.Settings('photos64', {key: 1})


def test_what_a_row_is_about_comes_after_the_users_changes():
  settings = ablation.Settings('photos64', {'model.local1d_width': 64})
  assert _plan('figure5/g', settings).tokenizer.model.local1d_width == 0
  assert _plan('figure5/g_l1', settings).tokenizer.model.local1d_width == 64


@pytest.mark.parametrize(
  ('paths', 'key'),
  [
    (['figure5/g', 'figure5/g_l2'], 'model.local1d_width'),
    (['figure5/g', 'cross_attend/all'], 'generator.loss.cls'),
    (['figure5/g'], 'loss.cls'),
    (['figure6/10m', 'figure6/100m'], 'scaling.model.local2d_depth'),
    (['controls/long'], 'tokenizer.train.steps'),
  ],
)
def test_a_change_that_no_row_takes_is_refused(paths, key):
  settings = ablation.Settings('photos64', {key: 1})
  plans = [_plan(path, settings) for path in paths]
  with pytest.raises(errors.ConfigError, match=f'{key}=1 does nothing in'):
    ablation.check_changes(plans, settings)
  more = _plan('table3/full', settings)
  if key != 'scaling.model.local2d_depth':
    ablation.check_changes([*plans, more], settings)


def test_settings_that_nothing_has():
  with pytest.raises(errors.ConfigError, match='--base'):
    ablation.Settings('photos65')
  with pytest.raises(errors.ConfigError, match='--budget'):
    ablation.Settings('photos64', budget=0.0)


def test_more_data_is_stage_2s_alone():
  plan = _plan('data/more')
  assert plan.scaling.config.data.path == 'more'
  assert not plan.tokenizer.config.data.path
  with pytest.raises(errors.ConfigError, match='--more_data=PATH'):
    _plan('data/more', ablation.Settings('photos64'))


def test_the_long_stage_1_has_the_steps_of_both():
  for base in ('photos64', 'imagenet256'):
    settings = ablation.Settings(base)
    full = _plan('table3/full', settings)
    assert _plan('controls/long', settings).tokenizer.config.train.steps == (
      full.tokenizer.config.train.steps + full.scaling.config.train.steps
    )


@pytest.mark.parametrize('like', ['figure5/g_l1_l2', 'table3/full'])
def test_large_decoders_have_the_parameters_of_the_row_they_match(like):
  row = next(row for row in ablations.ROWS if row.decoder_like == like)
  model = ablation.plan(row, SMALL).tokenizer.model
  wanted = ablation.count_parameters(_plan(like).scored.model)
  assert model.groups == ('global',)
  assert ablation.count_parameters(model) == pytest.approx(wanted, rel=0.01)


def test_blocks_are_added_before_the_decoder_is_widened():
  model = tiny.make_tokenizer(local1d_width=0, local2d_depth=0)
  for changes in ({'decoder_depth': 3}, {'decoder_width': 24}):
    wanted = ablation.count_parameters(model.clone(**changes))
    found = ablation.match_decoder(model, wanted)
    width = changes.get('decoder_width', 16)
    depth = changes.get('decoder_depth', 2)
    assert found == {
      'model.decoder_width': width,
      'model.decoder_depth': depth,
    }
  with pytest.raises(errors.ConfigError, match='to 10,000,000 parameters'):
    ablation.match_decoder(model, 10_000_000)


def test_parameters_are_those_that_are_initialised():
  model = tiny.make_tokenizer()
  params = tiny.noise_for(model.init, tiny.jax.random.key(0), tiny.images(1))
  assert ablation.count_parameters(model) == sum(
    leaf.size for leaf in tiny.jax.tree.leaves(params)
  )


def test_changes_in_words():
  words = ablation.describe_changes(ablations.find('table3/cb_off'))
  assert words == [
    'tokenizer.model.share_codebooks=True',
    "scaling.trainable=('local2d',)",
  ]
  assert ablation.describe_changes(ablations.find('controls/long')) == [
    'as many steps as table3/full'
  ]
