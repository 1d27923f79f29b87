"""A released SoftVQ-VAE as a run that everything else takes."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from selfboottok_jax import inference
from selfboottok_jax.pretrained import released_softvq
from selfboottok_jax.training import checkpointing
from tests import tiny as models
from tests.inference import released
from tests.launch import pictures

MODEL = [
  f'--config.model.{name}={value}'
  for name, value in released.SIZES.items()
  if name != 'image_size'
] + [
  '--config.model.head_dim=64',
  '--config.model.layer_scale=1e-5',
  '--config.model.unit_rms=False',
  '--config.model.bootstrap_from=quantized',
  '--config.model.local1d_width=0',
  '--config.model.local2d_depth=0',
  '--config.model.local2d_width=384',
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A checkpoint in the layout of the hub."""
  folder = tmp_path_factory.mktemp('softvq')
  arrays = released.state_dict(teacher=32)
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors')
  settings = json.dumps({'config': released.SETTINGS | {'tau': 0.05}})
  (folder / 'config.json').write_text(settings)
  return folder


@pytest.fixture(scope='module')
def workdir(server, folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'softvq'
  result = _import(server, folder, workdir)
  assert result.code == 0, result.err
  assert 'images of 16, 6 tokens of 5, tau 0.05' in result.out
  return workdir


def _import(server, folder, workdir):
  return server.run(
    'import_softvq', f'--network=softvq:{folder}', f'--workdir={workdir}'
  )


def test_is_loaded_as_it_was_imported(workdir):
  tokenizer = inference.load_tokenizer(workdir)
  assert tokenizer.step == 0
  model = tokenizer.model
  assert model.tau == 0.05
  assert (model.bootstrap_from, model.unit_rms) == ('quantized', False)
  params = released_softvq.read(released.state_dict(teacher=32), model, 'test')
  run = checkpointing.read_run(str(workdir), what='test', task='tokenizer')
  models.assert_same(run.params['tokenizer'], params)
  del params[released_softvq.HEAD]
  models.assert_same(tokenizer.params, params)
  pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
  codes = tokenizer.encode(pixels)
  assert codes.shape == (2, 6, 5)
  assert tokenizer.decode(codes).shape == pixels.shape
  # Every field is told, so that a default may change.
  fields = set(type(model).__dataclass_fields__) - {'parent', 'name'}
  assert fields - run.config['model'].keys() == {'image_size'}


@pytest.mark.slow
def test_is_scored_and_serves_a_generator(server, workdir, photos, tmp_path):
  generator = server.start(
    'train',
    '--config=tests/launch/tiny.py:generator',
    # Its 6 tokens do not divide 16 patches.
    '--config.loss.align_mode=global',
    f'--config.tokenizer={workdir}',
    f'--workdir={tmp_path / "generator"}',
  )
  score = server.run(
    'evaluate', f'--workdir={workdir}', f'--config.data.path={photos}'
  )
  assert score.code == 0, score.err
  scores = json.loads((workdir / 'scores.json').read_text())
  metrics = {record['metric']: record for record in scores}
  assert {'psnr', 'ssim', 'usage_global'} <= metrics.keys()
  # The digest that the import noted.
  config = json.loads((workdir / 'config.json').read_text())
  protocol = metrics['psnr']['protocol']
  assert config['imported']['weights'] == protocol['run_weights']
  trained = server.finish(generator)
  assert trained.code == 0, trained.err


@pytest.mark.slow
def test_is_fine_tuned_but_not_continued(server, workdir, tmp_path):
  command = [
    'train',
    '--config=tests/launch/tiny.py:tokenizer',
    '--config.loss.adversarial=0',
    '--config.loss.align=0',
    '--config.optimizer.learning_rate=1e-30',
    '--config.train.steps=1',
    *MODEL,
    '--config.model.tau=0.05',
  ]
  before = pictures.contents(workdir)
  tuned = server.start(
    *command,
    f'--config.init_from={workdir}',
    f'--workdir={tmp_path / "tuned"}',
  )
  refused = server.run(*command, f'--workdir={workdir}')
  assert 'holds weights that were imported' in refused.error
  assert f'--config.init_from={workdir}' in refused.error
  tuned = server.finish(tuned)
  assert tuned.code == 0, tuned.err
  assert pictures.contents(workdir) == before
  stored, source = (
    checkpointing.read_run(str(run), what='test').ema['tokenizer']
    for run in (tmp_path / 'tuned', workdir)
  )
  del source[released_softvq.HEAD]
  models.assert_same(stored, source)


def test_the_same_again_changes_nothing_and_another_is_refused(
  server, folder, workdir, tmp_path
):
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  before = pictures.contents(copy)
  again = _import(server, folder, copy)
  assert again.code == 0, again.err
  assert pictures.contents(copy) == before
  other = released.state_dict(seed=1)
  safetensors.numpy.save_file(other, tmp_path / 'model.safetensors')
  refused = _import(server, tmp_path / 'model.safetensors', copy)
  assert 'holds a run of another configuration' in refused.error
  assert 'imported.weights' in refused.error
  assert pictures.contents(copy) == before


@pytest.mark.parametrize(
  ('network', 'words'),
  [
    ('softvq', 'softvq:FILE'),
    ('dinov2_b', 'wanted one of softvq_b64'),
    ('softvq:{bad}/nothing.safetensors', "no weight file at '{bad}/nothing"),
    ('softvq:{bad}/other.safetensors', 'is no SoftVQ-VAE'),
    ('softvq:{bad}/settings', 'config.json is damaged'),
  ],
)
def test_what_cannot_be_imported(server, folder, tmp_path, network, words):
  bad = tmp_path / 'bad'
  shutil.copytree(folder, bad / 'settings')
  (bad / 'settings' / 'config.json').write_text('[1]')
  arrays = {'weight': np.zeros(3, np.float32)}
  safetensors.numpy.save_file(arrays, bad / 'other.safetensors')
  result = server.run(
    'import_softvq',
    f'--network={network.format(bad=bad)}',
    f'--workdir={tmp_path / "new"}',
  )
  assert words.format(bad=bad) in result.error
  assert not (tmp_path / 'new').exists()
