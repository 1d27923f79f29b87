import json
import signal
import time

import pytest

from selfboottok_jax.evaluation import ablation
from selfboottok_jax.training import checkpointing
from tests import processes, tiny
from tests.launch import ablations, commands


def test_the_list_has_all_rows(server):
  result = server.run('ablate', '--list')
  assert result.code == 0, result.err
  for text in ('table3/full', 'controls/softvq_largest', 'model.fusion'):
    assert text in result.out


def test_a_dry_run_prints_the_commands_and_writes_nothing(server, tmp_path):
  workdir = tmp_path / 'ablation'
  result = server.run(
    'ablate',
    *('--rows=figure6/100m,fusion/residual', '--seeds=0,3', '--dry_run'),
    *(f'--workdir={workdir}', '--metrics=psnr,fid,fd_hog', '--budget=0.01'),
  )
  assert result.code == 0, result.err
  lines = result.out.splitlines()
  trained = [line for line in lines if '-m launch.train' in line]
  scored = [line for line in lines if '-m launch.evaluate' in line]
  # Stage 1 and the generator are shared.
  assert len(trained) == 2 * 3
  assert len(scored) == 2 * 4
  assert all('--config.train.steps=30 ' in line for line in trained)
  assert sum('--config.train.seed=3' in line for line in trained) == 3
  assert sum('--metrics=psnr,fd_hog' in line for line in scored) == 4
  assert sum('--metrics=fid,fd_hog' in line for line in scored) == 4
  assert not workdir.exists()


def test_a_reference_takes_the_place_of_the_images(server, photos, tmp_path):
  result = server.run(
    'ablate',
    *('--rows=fusion/residual', '--dry_run', '--reference=real.npz'),
    *(f'--config.data.path={photos}', '--config.evaluate.data.num_images=9'),
    f'--workdir={tmp_path / "ablation"}',
  )
  assert result.code == 0, result.err
  samples, reconstructions = sorted(
    (x for x in result.out.splitlines() if '-m launch.evaluate' in x),
    key=lambda line: '--tokenizer=' not in line,
  )
  assert '--reference=real.npz' in samples
  assert '--config.data.' not in samples
  assert f'--config.data.path={photos}' in reconstructions
  assert '--config.data.num_images=9' in reconstructions
  assert '--reference' not in reconstructions


def test_rows_on_other_images_are_scored_on_those_of_stage_1(
  server, photos, tmp_path
):
  result = server.run(
    'ablate',
    *('--rows=data', '--dry_run', f'--more_data={photos / "train"}'),
    f'--config.tokenizer.data.path={photos}',
    f'--config.scaling.data.path={photos / "val"}',
    f'--workdir={tmp_path / "ablation"}',
  )
  assert result.code == 0, result.err
  scored = [x for x in result.out.splitlines() if '-m launch.evaluate' in x]
  assert len(scored) == 2
  assert all(f'--config.data.path={photos} ' in line for line in scored)


def test_what_cannot_be_run_is_refused_before_anything_is(
  server, photos, tmp_path
):
  workdir = f'--workdir={tmp_path / "ablation"}'
  for arguments, told in (
    ((workdir,), '--rows'),
    (('--rows=table3',), '--workdir'),
    (('--rows=table4', workdir), "no row 'table4'"),
    (('--rows=table3', '--seeds=a', workdir), '--seeds=a; wanted whole'),
    (('--rows=table3', '--seeds=', workdir), '--seeds='),
    (('--rows=table3', '--jobs=-1', workdir), '--jobs=-1'),
    (('--rows=table3', '--budget=0', workdir), '--budget'),
    (('--rows=table3', '--metrics=psnrr', workdir), 'psnrr'),
    (
      ('--rows=figure5/g', '--metrics=fid', workdir),
      'has nothing for figure5/g',
    ),
    (('--rows=data/more', workdir), '--more_data=PATH'),
    (
      (
        *('--rows=data/more', '--base=quickstart', workdir),
        f'--more_data={photos}',
      ),
      'stage 1 on built-in scenes',
    ),
    (('--rows=fusion', '--metrics=fdr,fd_hog,fd_dct', workdir), '--validation'),
    (('--rows=fusion', '--validation=x', workdir), 'is for fdr alone'),
    (('--rows=table3', '--config.train.seed=1', workdir), 'use --seeds'),
    (
      ('--rows=table3/g_l1', '--config.model.local2d_depth=1', workdir),
      'does nothing in table3/g_l1',
    ),
    (('--rows=table3', '--config.model.token_dims=1', workdir), 'is no key'),
    (('--rows=figure5', '--config.tokenizer.loss.kl=-1', workdir), 'loss.kl'),
    (('--rows=figure5', '--config.data.path=lost', workdir), 'lost'),
    (
      (
        *('--rows=fusion', '--base=quickstart', '--dry_run', workdir),
        '--config.evaluate.guidance_scales=(1.0,2.0)',
      ),
      'wanted one scale',
    ),
    (('--rows=figure5', workdir), 'path of the photographs is empty'),
  ):
    assert told in server.run('ablate', *arguments).error
  assert not (tmp_path / 'ablation').exists()


@pytest.mark.slow
@pytest.mark.long
def test_rows_share_trainings_and_fill_a_table(tmp_path):
  arguments = [
    '--rows=figure6/10m,fusion/residual',
    *ablations.flags('tokenizer', 'scaling', 'generator'),
    f'--workdir={tmp_path}',
  ]
  with commands.spawn('ablate', *arguments) as process:
    out, err = process.communicate()
  assert process.returncode == 0, (out, err)
  assert {run.name for run in (tmp_path / 'runs').iterdir()} == {
    *('table3_full_tokenizer_seed0', 'table3_full_generator_seed0'),
    'figure6_10m_scaling_seed0',
  }
  values = ablation.read(tmp_path)
  rows = {(value.table, value.row) for value in values}
  assert rows == {('figure6', '10m'), ('fusion', 'residual')}
  for row in rows:
    metrics = {v.metric: v for v in values if (v.table, v.row) == row}
    assert {'psnr', 'ssim', 'parameters', 'train_pflops'} <= set(metrics)
    assert metrics['train_pflops'].value > 0
    samples = [v for v in metrics.values() if v.of == ablation.SAMPLES]
    assert samples
    assert all(v.protocol['seed'] == 0 for v in samples)
  # Stage 1 and the generator cost the same; stage 2 comes on top.
  for metric in ('parameters', 'train_pflops'):
    costs = {v.table: v.value for v in values if v.metric == metric}
    assert costs['figure6'] > costs['fusion']
  page = (tmp_path / 'ablation.html').read_text()
  assert 'share some: 3 are run' not in page
  assert 'paper 1.56' in page
  # Nothing is left to do, and the tables are the same.
  before = (tmp_path / 'ablation.json').read_bytes()
  with commands.spawn('ablate', *arguments) as process:
    out, err = process.communicate()
  assert process.returncode == 0, (out, err)
  assert 'started' not in out
  assert (tmp_path / 'ablation.json').read_bytes() == before
  other = commands.spawn('ablate', *arguments, '--budget=2')
  _, err = other.communicate()
  assert 'holds rows of budget=1.0' in err


def _checkpoints(run) -> dict[str, tuple[int, bytes]]:
  return {
    str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes())
    for path in (run / checkpointing.FOLDER).rglob('*')
    if path.is_file()
  }


# Nothing is fetched, so that the row with DINOv2 fails.
OFFLINE = {'HF_HUB_OFFLINE': '1'}


@pytest.mark.faults
def test_killed_ablations_go_on_where_they_were(tmp_path):
  """kill -9 twice, with a row that fails beside one that does not."""
  arguments = [
    *('--rows=figure5/g,figure5/g_l1,table2/dinov2', '--metrics=psnr'),
    *ablations.flags('tokenizer'),
    '--config.tokenizer.train.steps=20',
    '--config.tokenizer.checkpoint.every=4',
    f'--workdir={tmp_path / "killed"}',
  ]
  first, second = (
    tmp_path / 'killed' / 'runs' / f'{name}_tokenizer_seed0'
    for name in ('figure5_g', 'table3_g_l1')
  )
  for saved in (first, second):
    with commands.spawn('ablate', *arguments, **OFFLINE) as process:
      while process.poll() is None:
        if (checkpointing.latest_step(str(saved)) or 0) >= 4:
          break
        time.sleep(0.02)
      children = processes.children(process.pid)
      process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(children) == 1
    assert processes.ended(children)
  finished = _checkpoints(first)
  with commands.spawn('ablate', *arguments, **OFFLINE) as process:
    out, err = process.communicate()
  # Row table2/dinov2 has no weights here.
  assert process.returncode == 1, (out, err)
  assert 'table2_dinov2_tokenizer_seed0: ' in out
  assert 'dinov2' in err.splitlines()[-1]
  assert 'table3_g_l1_tokenizer_seed0: started' in out
  assert 'figure5_g_tokenizer_seed0: started' not in out
  assert _checkpoints(first) == finished
  values = json.loads((tmp_path / 'killed' / 'ablation.json').read_text())
  assert {v['row'] for v in values if v['metric'] == 'psnr'} == {'g', 'g_l1'}
  text = (tmp_path / 'killed' / 'ablation.md').read_text()
  assert '**DINOv2** failed: ' in text
  # The run that was killed is the one that was not.
  dry = commands.spawn('ablate', *arguments, '--dry_run')
  out, err = dry.communicate()
  (line,) = [
    line
    for line in out.splitlines()
    if 'launch.train' in line and line.endswith(str(second))
  ]
  again = tmp_path / 'again'
  whole = line.split()[3:-1]
  with commands.spawn('train', *whole, f'--workdir={again}') as process:
    process.communicate()
  runs = [
    checkpointing.read_run(str(run), what='test') for run in (second, again)
  ]
  tiny.assert_same(runs[0].params, runs[1].params)
  tiny.assert_same(runs[0].ema, runs[1].ema)
