"""REG and REPA: networks, losses, gradients and three updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.models import sit
from selfboottok_jax.objectives import alignment, velocity
from selfboottok_jax.training import optim
from selfboottok_jax.training import state as state_lib
from tests.golden import generator_tasks, networks, records, rounding

pytestmark = pytest.mark.golden


@pytest.mark.parametrize(
  ('name', 'positions'), [('reg2d', '2d'), ('reg1d', '1d')]
)
def test_reg(name, positions, monkeypatch):
  with records.opened(name) as record:
    network = networks.load(record, 'reg', positions=positions)
    _check_outputs(record, network)
    _check_times(record)
    task = generator_tasks.make_task(network, record.meta)
    drawn = generator_tasks.inject(monkeypatch)
    inputs = generator_tasks.inputs(network, record.arrays)
    drawn.update(inputs.batch['drawn'])
    terms = task.terms(
      network.params(),
      inputs.batch,
      inputs.batch['label'],
      drawn['t'],
      inputs.rng,
      inputs.stats['latents'],
      train=True,
    )
    record.check('out.loss_v_per_sample', terms['velocity'])
    record.check('out.loss_cls_per_sample', terms['cls'])
    record.check('out.proj_loss', terms['alignment'])
    loss = generator_tasks.loss_of_weights(network, task, drawn)
    (total, _), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
      network.weights, inputs
    )
    record.check('out.loss_total', total)
    _check_gradients(record, gradients)


def _check_outputs(record, network):
  arrays = record.arrays
  out = jax.jit(functools.partial(network.apply, train=True))(
    network.tokens(arrays['in.x']),
    jnp.asarray(arrays['in.t']),
    networks.integers(arrays['in.y']),
    jnp.asarray(arrays['in.cls']),
    rngs={'dropout': jax.random.key(0)},
  )
  record.check('out.v', network.images(out.tokens))
  record.check('out.cls_v', out.cls)
  aligned = jnp.concatenate([out.aligned_cls[:, None], out.aligned], axis=1)
  record.check('out.z', aligned)
  if 'out.v_tok' in arrays:
    record.check('out.v_tok', out.tokens)


def _check_times(record):
  """Log-normal weighting, in their words: of sigma / alpha."""
  draws = jnp.asarray(record.arrays['in.logit_normal_draw'])
  for name in ('linear', 'cosine'):
    found = path_lib.PATHS[name].time_at(draws.reshape(-1))
    record.check(f'out.t_logitnormal_{name}', found.reshape(draws.shape))


def _check_gradients(record, gradients):
  names = record.read('out.grad_names')
  assert set(names) == gradients.keys() - {'pos_embed'}
  norms = [np.linalg.norm(gradients[name]) for name in names]
  record.check('out.grad_norms', np.array(norms))
  del gradients['pos_embed']
  record.check('out.clip_total_norm', optax.tree.norm(gradients))
  clip = optax.clip_by_global_norm(1.0)
  clipped, _ = clip.update(gradients, clip.init(gradients))
  for array in record.arrays:
    name = array.removeprefix('out.grad.')
    if name == 'y_embedder.embedding_table.weight':
      # Rows of the labels alone, which were copied before they were clipped.
      record.check(array, gradients[name][record.arrays['in.y']])
    elif name != array:
      record.check(array, clipped[name])


def test_three_updates_of_reg(monkeypatch):
  with records.opened('reg1d_train3') as record:
    meta = record.meta
    network = networks.load(record, 'reg', positions='1d')
    task = generator_tasks.make_task(network, meta)
    optimizer = optim.build_optimizer(
      steps=meta['steps'],
      learning_rate=meta['lr'],
      schedule='constant',
      warmup=0.0,
      b1=meta['betas'][0],
      b2=meta['betas'][1],
      epsilon=meta['eps'],
      weight_decay=meta['weight_decay'],
      clip_norm=meta['max_grad_norm'],
    )
    # Ours begins lower; theirs is constant.
    monkeypatch.setattr(state_lib, 'ema_decay', lambda step, limit: limit)
    drawn = generator_tasks.inject(monkeypatch)
    # The state holds their arrays, so that all is told by their names.
    loss = generator_tasks.loss_of_weights(network, task, drawn)
    state = state_lib.init_state(
      {'generator': network.weights},
      {'latents': generator_tasks.latents(network)},
      {'generator': optimizer},
      ('generator',),
    )
    update = jax.jit(
      state_lib.make_train_step(
        {'generator': loss},
        {'generator': optimizer},
        seed=0,
        ema_limit=meta['ema_decay'],
      )
    )
    logs = []
    for step in range(meta['steps']):
      arrays = {
        k: v[step] for k, v in record.arrays.items() if k.startswith('in.')
      }
      batch = generator_tasks.batch(network, arrays)
      state, metrics = update(state, {}, batch)
      names = (
        *('loss', 'loss/velocity', 'loss/alignment', 'loss/cls'),
        'generator_grad_norm',
      )
      logs.append([float(metrics[name]) for name in names])
    _check_logs(record, np.array(logs), names)
    _check_updates(record, network.weights, state)


def _check_logs(record, logs, names):
  expected = record.read('out.logs')
  args = record.meta['model_args']
  # A sum of losses has their errors; all but the alignment are of one sign.
  error = 2e-5 * np.abs(expected)
  # That is a mean of cosines, small itself: its error is theirs.
  width = args['hidden_size']
  error[:, names.index('loss/alignment')] = rounding.mean_cosine(
    args['z_dims'][0],
    *rounding.transformer(
      width, 1 + args['input_size'] ** 2, args['encoder_depth']
    ),
    # The projector.
    width,
    args['projector_dim'],
    args['projector_dim'],
  )
  record.check('out.logs', logs, error)
  # Parameters that lag by a step, and a sign.
  stale = np.concatenate([logs[:1], logs[:-1]])
  record.refuse('out.logs', stale, error, 100)
  for column in range(len(names)):
    wrong = logs.copy()
    wrong[:, column] *= -1
    record.refuse('out.logs', wrong, error, 100)


def _check_updates(record, before, state):
  names = record.read('out.names')
  assert set(names) == before.keys() - {'pos_embed'}
  for prefix, kind, after in (
    ('out.param.', 'out.delta_norms', state.params['generator']),
    ('out.ema.', 'out.ema_delta_norms', state.ema['generator']),
  ):
    deltas = [
      np.linalg.norm(
        np.asarray(after[name], np.float64) - np.asarray(before[name])
      )
      for name in names
    ]
    if kind == 'out.delta_norms':
      record.check(kind, np.array(deltas))
    else:
      lengths = [np.linalg.norm(before[name]) for name in names]
      error = rounding.moving_average(lengths, record.meta['steps'])
      record.check(kind, np.array(deltas), error)
      # An average that does not move.
      record.refuse(kind, np.zeros(len(deltas)), error, 3)
    for array in record.arrays:
      if array.startswith(prefix):
        record.check(array, after[array.removeprefix(prefix)])


def test_repa_with_two_teachers():
  with records.opened('repa2d') as record:
    arrays, widths = record.arrays, record.meta['model_args']['z_dims']
    data, noise = arrays['in.data'], arrays['in.noise']
    t = jnp.asarray(arrays['in.t_loss']).reshape(-1)
    alignments = {}
    for index in range(len(widths)):
      # A network has one projector: each in its turn.
      network = networks.load(record, 'repa', projector=index)
      out = _project(record, network, arrays['in.x'], arrays['in.t'])
      record.check('out.v', network.images(out.tokens))
      record.check(f'out.z{index}', out.aligned)
      for name in ('linear', 'cosine'):
        path = path_lib.PATHS[name]
        x = path.interpolate(jnp.asarray(data), jnp.asarray(noise), t)
        out = _project(record, network, x, t)
        clean, noises = network.tokens(data), network.tokens(noise)
        record.check(
          f'out.loss_v_per_sample_{name}',
          velocity.velocity_loss(out.tokens, clean, noises, t, path),
        )
        target = jnp.asarray(arrays[f'in.target_z{index}'])
        alignments.setdefault(name, []).append(
          alignment.alignment_loss(target, out.aligned)
        )
    for name, terms in alignments.items():
      record.check(f'out.proj_loss_{name}', sum(terms) / len(terms))


def _project(record, network, images, t) -> sit.SiTOutput:
  return jax.jit(functools.partial(network.apply, train=True))(
    network.tokens(images),
    jnp.asarray(t),
    networks.integers(record.arrays['in.y']),
    rngs={'dropout': jax.random.key(0)},
  )


def test_alignment_of_fewer_tokens_than_patches():
  with records.opened('softvq_align_loss') as record:
    arrays = {k: jnp.asarray(v) for k, v in record.arrays.items()}
    data, noise = arrays['in.data'], arrays['in.noise']
    t, path = arrays['in.t_loss'].reshape(-1), path_lib.PATHS['linear']
    record.check('out.xt', path.interpolate(data, noise, t))
    record.check(
      'out.loss_v_per_sample',
      velocity.velocity_loss(arrays['in.model_out'], data, noise, t, path),
    )
    for mode, array in (
      ('repeat', 'out.proj_loss_repeat'),
      ('pool', 'out.alt_proj_pooled'),
      ('global', 'out.alt_proj_global'),
    ):
      found = alignment.alignment_loss(
        arrays['in.target_z'], arrays['in.z_tilde'], mode=mode
      )
      record.check(array, found)
