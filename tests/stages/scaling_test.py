import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.inference import tokenizer as inference_tokenizer
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.stages import scaling
from selfboottok_jax.training import checkpointing
from tests import tiny
from tests.stages import tokenizers

# A step of either stage, with a critic, compiles for half a minute.
pytestmark = pytest.mark.slow

LARGER = {'local2d_width': 24, 'local2d_depth': 2}
TRAINABLE = ('local2d', 'quantizer_local2d')
STEPS = 3
# One teacher, so that a head is part of the base, and the critic.
LOSS = {
  'adversarial_start': 0.0,
  'perceptual': 0.0,
  'repa_local': 0.0,
  'transport': 0.0,
  'kl': 0.0,
}


def _batch():
  return {'image': tiny.images(4), 'label': jnp.zeros(4, jnp.int32)}


def _scaling_task(trainable=TRAINABLE, **options):
  return tokenizers.make_task(
    scaling.ScalingTask,
    steps=10,
    model=LARGER,
    loss=LOSS,
    trainable=trainable,
    **options,
  )


@pytest.fixture(
  scope='module',
  params=[
    pytest.param(k, marks=pytest.mark.long if k == 'dino' else ())
    for k in tokenizers.KINDS
  ],
)
def kind(request):
  return request.param


@pytest.fixture(scope='module')
def stage1(kind):
  """A run of stage 1 that has seen an adversarial step, and its moments."""
  task = tokenizers.make_task(steps=10, loss=LOSS, critic=kind)
  step_fn, state = tokenizers.make_step(task), tokenizers.init_state(task)
  for _ in range(2):
    state, _ = step_fn(state, task.frozen, _batch())
  run = checkpointing.Run(
    'STAGE1', {}, 2, state.params, state.ema, state.stats, {}
  )
  return run, state.opt


@pytest.fixture(scope='module')
def trained(stage1, kind):
  task = _scaling_task(critic=kind)
  fresh = tokenizers.init_state(task, seed=1)
  start = scaling.start_from(fresh, *stage1)
  step_fn, state = tokenizers.make_step(task), start
  for _ in range(STEPS):
    state, metrics = step_fn(state, task.frozen, _batch())
  return task, fresh, start, state, metrics


def test_starts_from_the_means_of_stage_1(stage1, trained):
  (run, _), (_, fresh, start, _, _) = stage1, trained
  means = run.ema['tokenizer']
  assert set(start.params['tokenizer']) == set(TRAINABLE)
  # Heads to teachers that can teach nothing here are left behind.
  assert any(name.startswith(tokenizer_lib.PROJECTOR) for name in means)
  assert not any(
    n.startswith(tokenizer_lib.PROJECTOR) for n in start.params['base']
  )
  for name, module in start.params['base'].items():
    tiny.assert_same(module, means[name])
  # Statistics of unchanged shape go on; the larger aligner starts anew.
  tiny.assert_same(
    start.params['tokenizer']['quantizer_local2d'], means['quantizer_local2d']
  )
  tiny.assert_same(
    start.params['tokenizer']['local2d'], fresh.params['tokenizer']['local2d']
  )
  tiny.assert_same(start.ema['tokenizer'], start.params['tokenizer'])
  assert tiny.changed(
    means['quantizer_local2d'], run.params['tokenizer']['quantizer_local2d']
  )


def test_the_discriminator_goes_on(stage1, trained):
  (run, opt), (_, fresh, start, state, _) = stage1, trained
  tiny.assert_same(start.params['discriminator'], run.params['discriminator'])
  tiny.assert_same(start.stats, run.stats)
  assert tiny.changed(fresh.stats, start.stats)
  assert tiny.changed(start.stats, state.stats)
  for a, b in zip(
    jax.tree.leaves(start.opt['discriminator']),
    jax.tree.leaves(opt['discriminator']),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  assert run.stats['lecam']['real'] != 0
  assert tiny.changed(fresh.opt['discriminator'], start.opt['discriminator'])
  assert tiny.changed(
    start.params['discriminator'], state.params['discriminator']
  )


def test_the_base_stays_bit_for_bit_while_the_rest_learns(trained):
  _, _, start, state, metrics = trained
  tiny.assert_same(state.params['base'], start.params['base'])
  for name in TRAINABLE:
    assert tiny.changed(
      state.params['tokenizer'][name], start.params['tokenizer'][name]
    )
  assert np.isfinite(float(metrics['loss']))
  assert set(state.ema) == {'tokenizer'}
  assert set(state.opt) == {'tokenizer', 'discriminator'}


def test_the_fingerprint_stays(stage1, trained):
  (run, _), (task, _, _, state, _) = stage1, trained
  before = inference_tokenizer.fingerprint(
    tiny.make_tokenizer(), tokenizer_lib.served_params(run.params, run.ema)
  )
  served = tokenizer_lib.served_params(state.params, state.ema)
  assert inference_tokenizer.fingerprint(task.model, served) == before
  changed = served | {'encoder': tiny.awake(served['encoder'])}
  assert inference_tokenizer.fingerprint(task.model, changed) != before


@pytest.mark.parametrize('module', scaling.CONTRACT)
def test_what_generators_rely_on_cannot_be_trained(module):
  with pytest.raises(errors.ConfigError, match=f'would change {module}'):
    _scaling_task(trainable=('local2d', module))


def test_unknown_modules_are_named():
  task = _scaling_task(trainable=('local2d', 'local3d'))
  with pytest.raises(errors.ConfigError, match='no local3d; wanted some of'):
    jax.eval_shape(task.init, jax.random.key(0))


def test_more_of_the_decoding_side_can_be_trained(stage1, kind):
  task = _scaling_task(
    trainable=(*TRAINABLE, 'fuse', 'decoder', 'local1d'), critic=kind
  )
  start = scaling.start_from(tokenizers.init_state(task, seed=1), *stage1)
  means = stage1[0].ema['tokenizer']
  for name in ('fuse', 'decoder', 'local1d'):
    tiny.assert_same(start.params['tokenizer'][name], means[name])
  assert not set(start.params['base']) & set(start.params['tokenizer'])


def test_stage_1_of_another_size_does_not_fit(stage1):
  run, opt = stage1
  task = tokenizers.make_task(
    scaling.ScalingTask,
    steps=10,
    model=LARGER | {'encoder_width': 24},
    loss=LOSS,
    trainable=TRAINABLE,
  )
  shapes = jax.eval_shape(tokenizers.make_init(task))
  with pytest.raises(
    errors.CheckpointError, match='tokenizer=STAGE1 does not fit: encoder'
  ):
    scaling.start_from(shapes, run, opt)


def test_another_discriminator_does_not_fit(stage1, kind):
  (other,) = set(tokenizers.KINDS) - {kind}
  task = _scaling_task(critic=other)
  with pytest.raises(errors.CheckpointError, match='same .*discriminator'):
    scaling.start_from(tokenizers.init_state(task, seed=1), *stage1)


def test_without_a_discriminator_in_stage_1_a_fresh_one_begins(stage1, kind):
  run, opt = stage1
  params = {k: v for k, v in run.params.items() if k != 'discriminator'}
  bare = checkpointing.Run('STAGE1', {}, 2, params, run.ema, {}, {})
  fresh = tokenizers.init_state(_scaling_task(critic=kind), seed=1)
  start = scaling.start_from(fresh, bare, {'tokenizer': opt['tokenizer']})
  tiny.assert_same(start.params['discriminator'], fresh.params['discriminator'])
