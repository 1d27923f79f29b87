import json

import numpy as np
import pytest

from selfboottok_jax.evaluation import evaluate
from tests.launch import commands, pictures


def _run(server, *arguments):
  result = server.run('evaluate', '--config.data.batch_size=4', *arguments)
  assert result.code == 0, result.err
  return result


def _read(path):
  """The scores in a file: metric -> value."""
  return {s['metric']: s['value'] for s in json.loads(path.read_text())}


def test_scores_a_tokenizer_on_photographs(server, runs, photos):
  workdir = runs / 'tokenizer'
  result = _run(
    server,
    f'--workdir={workdir}',
    f'--config.data.path={photos}',
    '--metrics=psnr,ssim,usage,distance_hog,fd_hog',
  )
  records = json.loads((workdir / 'scores.json').read_text())
  assert records == json.loads(result.out.splitlines()[-1])
  metrics = {record['metric'] for record in records}
  assert {'psnr', 'usage_global', 'distance_hog', 'fd_hog'} <= metrics
  for record in records:
    assert record['run'] == str(workdir)
    assert record['protocol']['reference'] == f'{photos} (val)'
    assert record['protocol']['count'] == 8
    assert record['protocol']['step'] == 2
    assert record['protocol']['parameters'] == 'EMA'
  # Another protocol stands beside it, the same one replaces it.
  for _ in range(2):
    _run(server, f'--workdir={workdir}', '--metrics=psnr', '--ema=False')
  found = evaluate.read_scores(workdir)
  assert [s.metric for s in found].count('psnr') == 2
  assert len(found) == len(records) + 1


def test_a_folder_of_reconstructions_scores_as_its_run(
  server, runs, photos, tmp_path
):
  metrics = '--metrics=psnr,ssim,ssim_range2,distance_hog,fd_hog'
  before = pictures.contents(runs / 'scaled')
  found = {}
  for place in ('made', 'made.npz'):
    out = tmp_path / 'scores' / f'of_{place}.json'
    _run(
      server,
      f'--workdir={runs / "scaled"}',
      f'--config.data.path={photos}',
      metrics,
      f'--out={out}',
      f'--save_reconstructions={tmp_path / place}',
    )
    found[place] = _read(out)
  assert found['made'] == found['made.npz']
  # Another order, which the names tell.
  with np.load(tmp_path / 'made.npz') as arrays:
    images, names = arrays['arr_0'][::-1], arrays['names'][::-1]
  np.savez(tmp_path / 'turned.npz', arr_0=images, names=names)
  _run(
    server,
    f'--samples={tmp_path / "turned.npz"}',
    f'--pairs={photos}',
    metrics,
    f'--out={tmp_path / "turned.json"}',
  )
  turned = _read(tmp_path / 'turned.json')
  for metric, value in found['made'].items():
    np.testing.assert_allclose(turned[metric], value, rtol=1e-5)
  for place in found:
    out = tmp_path / f'{place}.json'
    _run(
      server,
      f'--samples={tmp_path / place}',
      f'--pairs={photos}',
      metrics,
      f'--out={out}',
    )
    assert _read(out) == found['made']
  # The run lists them, and is otherwise as it was.
  scored = evaluate.read_scores(runs / 'scaled')
  assert {s.metric: s.value for s in scored} == found['made']
  (runs / 'scaled' / evaluate.SCORE_FILES).unlink()
  assert pictures.contents(runs / 'scaled') == before


def _of_generator(runs):
  return [
    f'--workdir={runs / "generator"}',
    f'--tokenizer={runs / "scaled"}',
    '--num_samples=6',
  ]


def test_scores_a_generator_and_leaves_its_tokenizer_alone(
  server, runs, photos, tmp_path
):
  before = pictures.contents(runs / 'scaled')
  _run(
    server,
    *_of_generator(runs),
    f'--reference={photos}',
    '--config.guidance_scales=(1.5, 2.0)',
    f'--out={tmp_path / "gen.json"}',
  )
  records = json.loads((tmp_path / 'gen.json').read_text())
  assert [(r['metric'], r['protocol'].get('guidance')) for r in records] == [
    ('fd_hog', 1.5),
    ('fd_hog', 2.0),
    ('fd_hog_gaussian_codes', None),
  ]
  for record in records:
    assert record['protocol']['labels'] == 'random'
    assert record['protocol']['count'] == 6
  assert pictures.contents(runs / 'scaled') == before


@pytest.mark.slow
def test_samples_are_scored_without_being_kept(server, runs, photos, tmp_path):
  result = server.run(
    'sample',
    *_of_generator(runs),
    '--npz',
    '--nopng',
    f'--out={tmp_path / "kept"}',
  )
  assert result.code == 0, result.err
  out = tmp_path / 'kept.json'
  _run(
    server,
    f'--samples={tmp_path / "kept"}',
    f'--reference={photos}',
    f'--out={out}',
  )
  # Scored as they are made, in other batches.
  result = server.run(
    'sample',
    *_of_generator(runs),
    f'--score_against={photos}',
    '--metrics=fd_hog',
    '--batch_size=4',
    f'--out={tmp_path / "sampled.json"}',
  )
  assert result.code == 0, result.err
  sampled = _read(tmp_path / 'sampled.json')
  np.testing.assert_allclose(sampled['fd_hog'], _read(out)['fd_hog'], rtol=1e-5)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    *('kept', 'kept.json', 'sampled.json'),
  ]


def test_samples_of_anybody(server, photos, tmp_path):
  result = _run(server, f'--samples={photos}/val', f'--reference={photos}')
  (record,) = json.loads(result.out.splitlines()[-1])
  assert record['metric'] == 'fd_hog'
  # The same pictures.
  np.testing.assert_allclose(record['value'], 0, atol=1e-6)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    ((), 'wanted one of them'),
    (('--workdir={runs}/tokenizer', '--samples={photos}'), 'wanted one of'),
    (('--workdir={runs}/tokenizer', '--pairs={photos}'), '--pairs='),
    (('--samples={photos}', '--step=2'), '--step=2 is for --workdir'),
    (('--samples={photos}', '--metrics=psnr'), '--samples with --pairs'),
    (('--samples={photos}', '--metrics=fid'), 'wanted --reference'),
    (('--samples={photos}', '--metrics='), 'is empty'),
    (('--samples={photos}',), 'wanted --reference'),
    (('--workdir={runs}/tokenizer', '--step=7'), 'wanted one of 2'),
    (('--workdir={runs}/tokenizer', '--metrics=pnsr'), 'wanted psnr'),
    (
      ('--workdir={runs}/tokenizer', '--out={photos}'),
      '--out={photos} is a folder',
    ),
    (
      ('--workdir={runs}/tokenizer', '--save_reconstructions={photos}'),
      'is not empty',
    ),
    (
      ('--workdir={runs}/tokenizer', '--tokenizer={runs}/softvq'),
      'a tokenizer itself',
    ),
    (
      ('--workdir={runs}/tokenizer', '--num_samples=9'),
      'a tokenizer itself',
    ),
    (
      ('--samples={photos}', '--config.data.num_images=9', '--metrics=is'),
      'data.num_images=9 with --samples',
    ),
    (
      (
        '--workdir={runs}/generator',
        '--tokenizer={runs}/scaled',
        '--reference={photos}',
        '--config.data.path={photos}',
      ),
      'data.path={photos} with --reference',
    ),
    (('--workdir={runs}/generator',), '--tokenizer not given'),
    (
      (
        '--workdir={runs}/generator',
        '--tokenizer={runs}/scaled',
        '--save_reconstructions=x',
      ),
      'launch.sample',
    ),
    (('--samples={photos}', '--pairs={photos}/lost'), '--pairs={photos}/lost'),
    (('--samples={photos}/lost', '--reference={photos}'), 'does not exist'),
    (('--samples={photos}', '--reference={photos}/lost'), 'does not exist'),
  ],
)
def test_what_cannot_be_scored(arguments, told, server, runs, photos):
  filled = [a.format(runs=runs, photos=photos) for a in arguments]
  error = server.run('evaluate', *filled).error
  assert told.format(runs=runs, photos=photos) in error


@pytest.mark.slow
def test_two_processes_score_as_one(server, runs, photos, tmp_path):
  arguments = [
    f'--workdir={runs / "tokenizer"}',
    f'--config.data.path={photos}',
    '--metrics=psnr,ssim,usage,perplexity,latents,distance_hog,fd_hog',
  ]
  alone, together = tmp_path / 'alone.json', tmp_path / 'together.json'
  _run(server, *arguments, f'--out={alone}')
  first, second = commands.run_together(
    'evaluate',
    *arguments,
    f'--out={together}',
    '--config.data.batch_size=6',
    f'--save_reconstructions={tmp_path / "made"}',
  )
  assert 'psnr' in first.out
  assert 'psnr' not in second.out
  expected = _read(alone)
  for metric, value in _read(together).items():
    np.testing.assert_allclose(
      value, expected[metric], rtol=1e-5, atol=1e-6, err_msg=metric
    )
  assert len(list((tmp_path / 'made').rglob('*.png'))) == 8
