"""Commands whose folders are in an object store."""

import io
import json

import numpy as np
import pytest

from selfboottok_jax import inference
from selfboottok_jax.training import checkpointing
from tests import tiny
from tests.launch import commands

STAGES = ('softvq', 'tokenizer', 'scaled', 'generator')


@pytest.fixture
def there(store, runs, bucket) -> str:
  """The runs of the fixture `runs`, copied into a store."""
  workdir = f'{bucket}/my runs/ü'
  store.upload(runs, workdir)
  return workdir


@pytest.mark.slow
@pytest.mark.long
def test_all_stages_train_in_a_store(server, store, runs, bucket):
  trained = f'{bucket}/my runs/ü'
  for _ in range(2):
    # The second time they are complete.
    result = server.run('tests.launch.untrained', trained, **store.variables)
    assert result.code == 0, result.err
  for name in STAGES:
    stored, local = (
      checkpointing.read_run(f'{place}/{name}', what='test')
      for place in (trained, runs)
    )
    assert stored.step == local.step == 2
    for part in ('params', 'ema', 'stats'):
      tiny.assert_same(getattr(stored, part), getattr(local, part))
    kept = {path.name for path in (runs / name).iterdir()}
    names = {n.split('/')[0] for n in store.names(f'{trained}/{name}')}
    assert names == kept
    lines = store.read(f'{trained}/{name}/metrics.jsonl').splitlines()
    assert len(lines) == len(
      (runs / name / 'metrics.jsonl').read_text().splitlines()
    )
  # A relative path of that name would be a folder here.
  assert not (commands.ROOT / 'gs:').exists()


def test_python_reads_runs_of_a_store(there, runs):
  tokenizer = inference.load_tokenizer(f'{there}/scaled')
  local = inference.load_tokenizer(runs / 'scaled')
  assert tokenizer.fingerprint == local.fingerprint
  generator = inference.load_generator(f'{there}/generator', tokenizer=local)
  assert generator.step == 2


def _sample(server, place, out, *more, **variables):
  result = server.run(
    'sample',
    f'--workdir={place}/generator',
    f'--tokenizer={place}/scaled',
    f'--out={out}',
    '--num_samples=5',
    '--npz',
    *more,
    **variables,
  )
  assert result.code == 0, result.err
  return result.out


@pytest.mark.slow
@pytest.mark.long
def test_samples_go_into_a_store(there, server, store, runs, tmp_path):
  out, local = f'{there}/samples', tmp_path / 'samples'
  _sample(server, runs, local)
  said = _sample(server, there, out, '--batch_size=2', **store.variables)
  assert f'5 samples in {out} (' in said
  names = sorted(
    path.relative_to(local).as_posix()
    for path in local.rglob('*')
    if path.is_file()
  )
  assert store.names(out) == names
  for name in names:
    if name.endswith('.png'):
      assert store.read(f'{out}/{name}') == (local / name).read_bytes()
  with (
    np.load(io.BytesIO(store.read(f'{out}/samples.npz'))) as stored,
    np.load(local / 'samples.npz') as wanted,
  ):
    for name in ('arr_0', 'arr_1'):
      np.testing.assert_array_equal(stored[name], wanted[name])
  # What is lost is made again.
  store.remove(f'{out}/grid.png')
  assert '5 samples are' not in _sample(server, there, out, **store.variables)
  assert store.names(out) == names
  said = _sample(server, there, out, **store.variables)
  assert f'5 samples are in {out} already' in said


@pytest.mark.slow
@pytest.mark.long
def test_scores_and_a_page_go_into_a_store(there, server, store):
  result = server.run(
    'evaluate',
    f'--workdir={there}/tokenizer/',
    '--config.data.num_images=8',
    '--config.data.batch_size=4',
    **store.variables,
  )
  assert result.code == 0, result.err
  records = json.loads(store.read(f'{there}/tokenizer/scores.json'))
  assert {record['metric'] for record in records} >= {'psnr'}
  result = server.run(
    'report',
    f'--runs={there}/tokenizer,{there}/generator',
    f'--tokenizer={there}/scaled',
    f'--out={there}/page',
    '--per_class=2',
    **store.variables,
  )
  assert result.code == 0, result.err
  assert f'{there}/page/report.html written' in result.out
  names = store.names(f'{there}/page')
  assert {'report.html', 'samples.png'} <= set(names)
  page = store.read(f'{there}/page/report.html').decode()
  assert 'val/velocity_loss' in page


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_training_goes_on_in_a_store(there, store, runs, tmp_path):
  """With gradients, and a kill -9 between two saves."""
  arguments = (
    '--config=tests/launch/tiny.py:generator',
    '--config.train.steps=30',
    '--config.checkpoint.every=5',
  )
  local, stored = tmp_path / 'whole', f'{there}/killed'
  with commands.spawn(
    'train',
    *arguments,
    f'--config.tokenizer={runs}/tokenizer',
    f'--workdir={local}',
  ) as process:
    err = process.stderr.read()
  assert process.returncode == 0, err
  arguments += (f'--config.tokenizer={there}/tokenizer', f'--workdir={stored}')
  with commands.spawn('train', *arguments, **store.variables) as process:
    for line in process.stderr:
      if ': step 12/' in line:
        process.kill()
  left = checkpointing.latest_step(stored)
  assert left in (5, 10)
  with commands.spawn('train', *arguments, **store.variables) as process:
    err = process.stderr.read()
  assert process.returncode == 0, err
  first, second = (
    checkpointing.read_run(str(place), what='test') for place in (local, stored)
  )
  assert first.step == second.step == 30
  for part in ('params', 'ema', 'stats', 'meta'):
    tiny.assert_same(getattr(first, part), getattr(second, part))
  lines = store.read(f'{stored}/metrics.jsonl').splitlines()
  steps = [json.loads(line)['step'] for line in lines]
  assert list(dict.fromkeys(steps)) == list(range(1, 31))


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_share_a_store(there, store):
  """Training and sampling, each process its share of what is written."""
  arguments = (
    '--config=tests/launch/tiny.py:generator',
    '--config.checkpoint.every=1',
    '--config.checkpoint.max_to_keep=1',
  )
  commands.run_together(
    'train',
    *arguments,
    f'--config.tokenizer={there}/tokenizer',
    f'--workdir={there}/together',
  )
  run = checkpointing.read_run(f'{there}/together', what='test')
  assert run.step == 2
  steps = {
    n.split('/')[0] for n in store.names(f'{there}/together/checkpoints')
  }
  assert steps == {'2'}
  first, second = commands.run_together(
    'sample',
    f'--workdir={there}/generator',
    f'--tokenizer={there}/scaled',
    f'--out={there}/shared',
    '--num_samples=5',
    '--batch_size=1',
    '--npz',
  )
  assert f'5 samples in {there}/shared' in first.out + second.out
  names = store.names(f'{there}/shared')
  assert len([name for name in names if name.startswith('images/')]) == 5
  assert not [name for name in names if name.startswith('parts/')]
  assert 'samples.npz' in names
