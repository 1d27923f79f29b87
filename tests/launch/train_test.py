import json
import shutil
import signal

import jax
import numpy as np
import pytest

from selfboottok_jax import data
from selfboottok_jax.training import checkpointing
from tests.launch import commands, logs, pictures

TOKENIZER = '--config=tests/launch/tiny.py:tokenizer'
SCALING = '--config=tests/launch/tiny.py:scaling'
GENERATOR = '--config=tests/launch/tiny.py:generator'


def test_logs_every_update_and_the_last_evaluation(runs):
  records = logs.read(runs / 'tokenizer')
  assert [r['step'] for r in records if 'loss' in r] == [1, 2]
  assert [r['step'] for r in records if 'val/psnr' in r] == [2]
  assert {'val/psnr_without_local2d', 'val/psnr_global_only'} <= set(
    records[-1]
  )
  (picture,) = (runs / 'tokenizer' / 'reconstructions').iterdir()
  assert picture.name == '2.png'


def test_finished_run_is_left_as_it_is(server, runs):
  before = pictures.contents(runs / 'tokenizer' / 'checkpoints')
  metrics = logs.read(runs / 'tokenizer', rates=True)
  result = server.run('train', TOKENIZER, f'--workdir={runs / "tokenizer"}')
  assert result.code == 0, result.err
  assert pictures.contents(runs / 'tokenizer' / 'checkpoints') == before
  assert logs.read(runs / 'tokenizer', rates=True) == metrics


@pytest.mark.slow
def test_steps_logging_mesh_and_remat_may_change(server, runs, tmp_path):
  workdir = tmp_path / 'longer'
  shutil.copytree(runs / 'generator', workdir)
  result = server.run(
    'train',
    GENERATOR,
    f'--config.tokenizer={runs / "tokenizer"}',
    f'--workdir={workdir}',
    '--config.train.steps=3',
    '--config.train.log_every=3',
    '--config.mesh.data=1',
    '--config.evaluation.num_images=4',
    '--config.model.remat=True',
    '--config.model.unroll=2',
  )
  assert result.code == 0, result.err
  assert checkpointing.latest_step(str(workdir)) == 3
  stored = checkpointing.read_config(str(workdir), 'test')
  assert stored['train']['steps'] == 3
  assert stored['mesh']['data'] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'task', ['generator', pytest.param('tokenizer', marks=pytest.mark.long)]
)
def test_bfloat16_gives_nearly_the_same_losses(task, server, runs, tmp_path):
  losses = []
  for dtype in ('float32', 'bfloat16'):
    arguments = [
      f'--config=tests/launch/tiny.py:{task}',
      f'--workdir={tmp_path / dtype}',
      f'--config.model.dtype={dtype}',
      # A generator starts at zero velocity in any type.
      '--config.train.steps=20',
      '--config.optimizer.learning_rate=0.01',
    ]
    if task == 'generator':
      arguments.append(f'--config.tokenizer={runs / "tokenizer"}')
    result = server.run('train', *arguments)
    assert result.code == 0, result.err
    records = logs.read(tmp_path / dtype)
    losses.append([r['loss'] for r in records if 'loss' in r])
  full, half = losses
  assert half != full
  # Terms of either sign nearly cancel in some.
  np.testing.assert_allclose(half, full, atol=0.05)


@pytest.mark.slow
@pytest.mark.long
def test_evaluations_change_no_bit_of_a_training(server, tmp_path):
  states = []
  for every in (0, 1):
    workdir = tmp_path / str(every)
    result = server.run(
      'train',
      TOKENIZER,
      f'--workdir={workdir}',
      f'--config.evaluation.every={every}',
      '--config.evaluation.perceptual=hog',
      '--config.evaluation.frechet=hog',
    )
    assert result.code == 0, result.err
    run = checkpointing.read_run(str(workdir), what='test')
    optimizer = checkpointing.read_optimizer(str(workdir), run.step)
    states.append((run.params, run.ema, run.stats, optimizer))
    names = {'val/distance_hog', 'val/fd_hog'}
    evaluated = [r for r in logs.read(workdir) if names <= set(r)]
    assert len(evaluated) == 1 + every
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_tokenizer_starts_from_another_run(server, runs, tmp_path):
  source, workdir = runs / 'tokenizer', tmp_path / 'tuned'
  before = pictures.contents(source)
  result = server.run(
    'train',
    TOKENIZER,
    f'--config.init_from={source}',
    f'--workdir={workdir}',
    '--config.loss.adversarial_start=0.5',
  )
  assert result.code == 0, result.err
  assert pictures.contents(source) == before
  # Same seed, same batch: only other parameters make another error.
  first, (tuned, last, *_) = logs.read(source)[0], logs.read(workdir)
  assert first['step'] == tuned['step'] == 1
  assert first['loss/pixel'] != tuned['loss/pixel']
  # The critic comes in half-way.
  assert 'discriminator_loss' not in tuned
  assert 'discriminator_loss' in last


@pytest.mark.slow
def test_scaled_run_is_fine_tuned_with_its_base_as_it_is(
  server, runs, tmp_path
):
  result = server.run(
    'train',
    SCALING,
    f'--config.tokenizer={runs / "tokenizer"}',
    f'--config.init_from={runs / "scaled"}',
    f'--workdir={tmp_path / "tuned"}',
  )
  assert result.code == 0, result.err
  tuned, scaled = (
    checkpointing.read_run(str(workdir), what='test').params['base']
    for workdir in (tmp_path / 'tuned', runs / 'scaled')
  )
  jax.tree.map(np.testing.assert_array_equal, tuned, scaled)


@pytest.mark.slow
def test_generator_that_normalises_otherwise_measures_anew(
  server, runs, tmp_path
):
  result = server.run(
    'train',
    GENERATOR,
    f'--config.tokenizer={runs / "tokenizer"}',
    f'--config.init_from={runs / "generator"}',
    '--config.loss.latent_statistics=channel',
    f'--workdir={tmp_path}',
  )
  assert result.code == 0, result.err
  old, new = (
    checkpointing.read_run(str(workdir), what='test').stats['latents']['std']
    for workdir in (runs / 'generator', tmp_path)
  )
  assert np.ptp(old) == 0
  assert np.ptp(new) > 0


@pytest.mark.slow
def test_generator_starts_from_another_run_on_other_classes(
  server, runs, photos, tmp_path
):
  source, workdir = runs / 'generator', tmp_path / 'tuned'
  before = pictures.contents(source)
  result = server.run(
    'train',
    GENERATOR,
    f'--config.tokenizer={runs / "tokenizer"}',
    f'--config.init_from={source}',
    '--config.data.source=auto',
    f'--config.data.path={photos}',
    '--config.optimizer.learning_rate=1e-12',
    f'--workdir={workdir}',
  )
  assert result.code == 0, result.err
  assert pictures.contents(source) == before
  old = checkpointing.read_run(str(source), what='test')
  new = checkpointing.read_run(str(workdir), what='test')
  assert new.meta['class_names'] == ['cat', 'dog']
  taken = dict(new.params['generator'])
  kept = dict(old.ema['generator'])
  fresh, other = (jax.tree.leaves(p.pop('label_table')) for p in (taken, kept))
  assert fresh[0].shape[0] == 3
  assert other[0].shape[0] == 11
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), taken, kept
  )
  jax.tree.map(
    np.testing.assert_array_equal, new.stats['latents'], old.stats['latents']
  )


def _interrupt(arguments) -> tuple[list[str], int]:
  """Ctrl-C once three updates are logged: the log's lines, and the code."""
  lines = []
  with commands.spawn('train', *arguments) as process:
    for line in process.stderr:
      lines.append(line.strip())
      # Three lines on the data come first.
      if len(lines) == 6:
        process.send_signal(signal.SIGINT)
  return lines, process.returncode


def test_interrupted_run_continues(runs, tmp_path):
  workdir = tmp_path / 'stopped'
  arguments = [
    GENERATOR,
    f'--config.tokenizer={runs / "tokenizer"}',
    f'--workdir={workdir}',
    '--config.train.steps=1000000',
    '--config.evaluation.every=0',
    '--config.checkpoint.every=0',
  ]
  last = 0
  for _ in range(2):
    lines, code = _interrupt(arguments)
    assert code == 130, lines
    assert [line.split(':')[0] for line in lines[:3]] == [
      'data',
      'split',
      'skipped',
    ]
    assert lines[3].startswith(f'generator: step {last + 1}/1000000')
    assert 'the same command continues' in lines[-1]
    step = checkpointing.latest_step(str(workdir))
    assert lines[-1].startswith(f'error: stopped at step {step} of 1000000')
    assert step >= last + 3
    last = step
  steps = [record['step'] for record in logs.read(workdir)]
  assert steps == list(range(1, last + 1))


def test_what_does_not_fit_together_is_found_before_anything_is_written(
  server, tmp_path
):
  workdir = tmp_path / 'new'
  command = ('train', TOKENIZER, f'--workdir={workdir}')
  result = server.run(*command, '--config.model.num_tokens=6')
  assert 'num_tokens=6 cannot be paired with the 4 patches' in result.error
  assert not workdir.exists()


@pytest.mark.slow
def test_images_that_cannot_be_read_are_skipped_and_named(server, tmp_path):
  photos = tmp_path / 'photos'
  for split in ('train', 'val'):
    pictures.write(photos / split / 'a', 8)
  pictures.truncate(photos / 'train/a/3.jpg')
  command = (
    'train', '--config=tests/launch/tiny.py:tokenizer',
    '--config.data.source=auto', f'--config.data.path={photos}',
    f'--workdir={tmp_path / "run"}',
  )  # fmt: skip
  # Two steps are an epoch.
  assert 'train/a/3.jpg is no image' in server.run(*command).error
  result = server.run(*command, '--config.data.bad=skip')
  assert result.code == 0, result.err
  assert 'skipped: ' in result.err
  (line,) = (tmp_path / 'run' / 'bad.jsonl').read_text().splitlines()
  assert json.loads(line)['path'].endswith('train/a/3.jpg')
  # Held-out images too, before the first step.
  pictures.truncate(photos / 'val/a/5.jpg')
  third = (*command[:-1], f'--workdir={tmp_path / "third"}')
  assert 'val/a/5.jpg is no image' in server.run(*third).error
  assert not (tmp_path / 'third').exists()
  result = server.run(*third, '--config.data.bad=skip')
  assert result.code == 0, result.err
  lines = (tmp_path / 'third' / 'bad.jsonl').read_text().splitlines()
  assert [json.loads(line)['path'][-7:] for line in lines] == [
    'a/5.jpg',
    'a/3.jpg',
  ]
  (photos / 'val/a/2.jpg').write_bytes(b'')
  other = (*command[:-1], f'--workdir={tmp_path / "other"}')
  error = server.run(*other).error
  assert 'val/a/2.jpg: the file is empty' in error
  assert 'data.bad=skip' in error
  assert not (tmp_path / 'other').exists()


@pytest.mark.slow
@pytest.mark.long
def test_runs_of_images_as_they_are_stored_say_how_to_continue(
  server, tmp_path
):
  photos = tmp_path / 'photos'
  for split in ('train', 'val'):
    pictures.write(photos / split / 'a', 8)
  command = (
    'train', TOKENIZER, '--config.data.source=auto',
    f'--config.data.path={photos}', f'--workdir={tmp_path / "run"}',
  )  # fmt: skip
  stored = '--config.data.exif=False'
  result = server.run(*command, stored)
  assert result.code == 0, result.err
  longer = '--config.train.steps=3'
  assert 'set --config.data.exif=False' in server.run(*command, longer).error
  # As a run of an earlier version, which hashed the listing alone.
  (meta,) = (tmp_path / 'run/checkpoints/2').rglob('metadata')
  text = meta.read_text()
  found = data.open_pictures(photos).splits['train']
  source = data.PictureSource(data.open_pictures(photos), 'train')
  given = source.as_stored().fingerprint
  assert given in text
  meta.write_text(text.replace(given, found.former))
  assert 'set --config.data.exif=False' in server.run(*command, longer).error
  result = server.run(*command, longer, stored)
  assert result.code == 0, result.err
