"""Released generators as runs that everything else takes."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from selfboottok_jax import errors, inference
from selfboottok_jax.pretrained import autoencoders, released_generators
from selfboottok_jax.training import checkpointing
from tests import tiny as models
from tests.inference import released_sits
from tests.launch import pictures

# The grid of 256 pixels, as wide as the codes of this autoencoder.
TOKENIZER, SIDE = 'vavae_tiny:random', 16
NETWORKS = {
  'sit': 'sit_xl2',
  'reg': 'reg_xl2',
  'lightningdit': 'lightningdit_xl1',
}
# Width of dinov2_tiny, whose class vector REG denoises.
TEACHER, CLS = 'dinov2_tiny:random', 48


def _arrays(family):
  return released_sits.state_dict(
    family, side=SIDE, cls=CLS, learn_sigma=family == 'sit'
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('generators')
  for family in NETWORKS:
    path = folder / f'{family}.safetensors'
    safetensors.numpy.save_file(_arrays(family), path)
  return folder


def _import(server, source, workdir, name='sit_xl2', *more):
  return server.run(
    'import_generator',
    f'--network={name}:{source}',
    f'--workdir={workdir}',
    f'--tokenizer={TOKENIZER}',
    f'--heads={released_sits.HEADS}',
    *more,
  )


@pytest.fixture(scope='module')
def runs_of(server, folder, tmp_path_factory):
  """Workdirs by family."""
  runs = {}
  for family, name in NETWORKS.items():
    runs[family] = tmp_path_factory.mktemp('runs') / family
    source = folder / f'{family}.safetensors'
    result = _import(server, source, runs[family], name)
    assert result.code == 0, result.err
    assert '256 tokens of 32, 5 classes' in result.out
  return runs


@pytest.fixture(scope='module')
def tokenizer():
  return inference.load_tokenizer(TOKENIZER)


@pytest.mark.slow
@pytest.mark.parametrize('family', list(NETWORKS))
def test_is_loaded_as_it_was_imported(runs_of, tokenizer, family):
  generator = inference.load_generator(runs_of[family], tokenizer=tokenizer)
  assert generator.step == 0
  assert generator.class_names == ('0', '1', '2', '3', '4')
  arrays, model = _arrays(family), generator.model
  params = released_generators.read(arrays, model, family, 'test')
  models.assert_same(generator.params, params)
  run = checkpointing.read_run(str(runs_of[family]), what='test')
  models.assert_same(run.params, run.ema)
  np.testing.assert_array_equal(run.stats['latents']['mean'], np.zeros(32))
  np.testing.assert_array_equal(run.stats['latents']['std'], np.ones(32))
  # Every field is told, so that a default may change.
  fields = set(type(model).__dataclass_fields__) - {'parent', 'name'}
  assert fields - run.config['model'].keys() == {
    'num_tokens', 'token_dim', 'num_classes'
  }  # fmt: skip
  assert model.dtype == 'float32'


def test_is_configured_as_its_authors_sample(runs_of):
  sampling = {
    family: checkpointing.read_config(str(workdir), 'test')['sampling']
    for family, workdir in runs_of.items()
  }
  assert sampling['sit']['guided_channels'] == 3
  assert sampling['reg']['guidance_high'] == 0.85
  assert sampling['lightningdit']['sampler'] == 'ode'
  assert sampling['lightningdit']['guidance_scale'] == 6.7


@pytest.mark.slow
@pytest.mark.parametrize('family', NETWORKS)
def test_samples(server, runs_of, tmp_path, family):
  result = server.run(
    'sample',
    f'--workdir={runs_of[family]}',
    f'--tokenizer={TOKENIZER}',
    f'--out={tmp_path / "samples"}',
    '--num_samples=2',
    '--batch_size=2',
    '--num_steps=2',
  )
  assert result.code == 0, result.err
  images = list((tmp_path / 'samples').rglob('0*.png'))
  assert len(images) == 2


def test_another_tokenizer_does_not_decode_for_it(runs_of):
  loaded = inference.load_autoencoder(TOKENIZER, 32)
  with pytest.raises(errors.CheckpointError, match='another token'):
    inference.load_generator(runs_of['sit'], tokenizer=loaded)


def _train(server, workdir, *more):
  """One step of no length on an imported network."""
  model = [
    f'--config.model.{name}={value}'
    for name, value in {
      'width': released_sits.WIDTH,
      'depth': released_sits.DEPTH,
      'heads': released_sits.HEADS,
      'align_depth': released_sits.DEPTH,
      'projector_width': released_sits.PROJECTOR,
    }.items()
  ]
  return server.start(
    'train',
    '--config=tests/launch/tiny.py:generator',
    f'--config.tokenizer={TOKENIZER}',
    '--config.data.image_size=256',
    '--config.data.batch_size=2',
    '--config.evaluation.num_images=2',
    '--config.evaluation.batch_size=2',
    '--config.optimizer.learning_rate=1e-30',
    '--config.train.steps=1',
    f'--workdir={workdir}',
    *model,
    *more,
  )


@pytest.mark.slow
def test_is_fine_tuned_but_not_continued(server, runs_of, tmp_path):
  before = pictures.contents(runs_of['reg'])
  plain = ('--config.networks.teacher=', '--config.loss.cls=0')
  tuned = {
    'sit': _train(
      server,
      tmp_path / 'sit',
      f'--config.init_from={runs_of["sit"]}',
      '--config.loss.align_mode=off',
      *plain,
    ),
    'reg': _train(
      server,
      tmp_path / 'reg',
      f'--config.init_from={runs_of["reg"]}',
      f'--config.networks.teacher={TEACHER}',
    ),
  }
  refused = server.finish(_train(server, runs_of['reg'], *plain))
  assert 'holds weights that were imported' in refused.error
  assert pictures.contents(runs_of['reg']) == before
  for family, started in tuned.items():
    result = server.finish(started)
    assert result.code == 0, result.err
    stored, source = (
      checkpointing.read_run(str(run), what='test').ema['generator']
      for run in (tmp_path / family, runs_of[family])
    )
    # The classes of the training are others.
    del stored['label_table'], source['label_table']
    models.assert_same(stored, source)


def test_a_run_of_softvq_is_its_own_tokenizer(server, runs, tmp_path):
  """The run of any tokenizer whose codes have the sizes of the file."""
  loaded = inference.load_tokenizer(runs / 'tokenizer')
  arrays = released_sits.state_dict(
    'softvq', side=2, token_dim=loaded.token_dim
  )
  source, workdir = tmp_path / 'softvq.safetensors', tmp_path / 'run'
  safetensors.numpy.save_file(arrays, source)
  command = (
    'import_generator',
    f'--network=softvq_sit_b64:{source}',
    f'--workdir={workdir}',
    f'--heads={released_sits.HEADS}',
  )
  assert '--tokenizer not given' in server.run(*command).error
  result = server.run(*command, f'--tokenizer={runs / "tokenizer"}')
  assert result.code == 0, result.err
  generator = inference.load_generator(workdir, tokenizer=loaded)
  # Their codes are normalised by two numbers.
  kind = released_generators.RELEASED['softvq_sit_b64']
  assert 0 < kind.std < 0.1
  np.testing.assert_allclose(generator.statistics['mean'], kind.mean)
  np.testing.assert_allclose(generator.statistics['std'], kind.std)
  codes = generator.sample_codes([0, 4], num_steps=2)
  assert codes.shape == (2, loaded.num_tokens, loaded.token_dim)
  assert jnp.isfinite(codes).all()


def test_the_published_tokenizer_is_told_without_its_weights(server, tmp_path):
  """The size of the file decides that of the images."""
  arrays = released_sits.state_dict('sit', side=2, token_dim=16)
  source, workdir = tmp_path / 'sit.safetensors', tmp_path / 'run'
  safetensors.numpy.save_file(arrays, source)
  result = server.run(
    'import_generator',
    f'--network=sit_xl2:{source}',
    f'--workdir={workdir}',
    f'--heads={released_sits.HEADS}',
  )
  assert result.code == 0, result.err
  run = checkpointing.read_run(str(workdir), what='test', task='generator')
  assert run.config['tokenizer'] == 'sdvae'
  assert run.config['data']['image_size'] == 32
  wanted = autoencoders.fingerprint('sdvae', 32)
  assert run.meta['tokenizer_fingerprint'] == wanted


def test_the_same_again_changes_nothing_and_another_is_refused(
  server, folder, runs_of, tmp_path
):
  copy = tmp_path / 'run'
  shutil.copytree(runs_of['sit'], copy)
  before = pictures.contents(copy)
  again = _import(server, folder / 'sit.safetensors', copy)
  assert again.code == 0, again.err
  assert pictures.contents(copy) == before
  other = released_sits.state_dict('sit', side=SIDE, seed=1)
  safetensors.numpy.save_file(other, tmp_path / 'other.safetensors')
  refused = _import(server, tmp_path / 'other.safetensors', copy)
  assert 'holds a run of another configuration' in refused.error
  assert pictures.contents(copy) == before


@pytest.mark.parametrize(
  ('network', 'words'),
  [
    ('sit', 'wanted one of sit_xl2'),
    ('softvq_b64', 'or with a source, as sit_xl2:FILE'),
    ('sit_xl2', 'fetch this from https://www.dl.dropboxusercontent.com'),
    ('reg_xl2', 'fetch this from https://huggingface.co/Martinser/REG'),
    ('sit_xl2:{bad}/nothing.safetensors', "no weight file at '{bad}/nothing"),
    ('sit_xl2:{bad}/other.safetensors', 'is no SiT'),
    ('sit_xl2:{bad}/reg.safetensors', 'is reg; name the network that it is'),
    (
      'repa_xl2:{bad}/small.safetensors',
      'makes 16 tokens of 32, and the network is of',
    ),
    ('sit_xl2:{bad}/cut.safetensors', '1 missing: blocks.2.attn.proj.bias'),
  ],
)
def test_what_cannot_be_imported(server, folder, tmp_path, network, words):
  bad = tmp_path / 'bad'
  shutil.copytree(folder, bad)
  arrays = {'weight': np.zeros(3, np.float32)}
  safetensors.numpy.save_file(arrays, bad / 'other.safetensors')
  small = released_sits.state_dict('repa', token_dim=16)
  safetensors.numpy.save_file(small, bad / 'small.safetensors')
  cut = _arrays('sit')
  del cut['blocks.2.attn.proj.bias']
  safetensors.numpy.save_file(cut, bad / 'cut.safetensors')
  result = server.run(
    'import_generator',
    f'--network={network.format(bad=bad)}',
    f'--workdir={tmp_path / "new"}',
    f'--tokenizer={TOKENIZER}',
    f'--heads={released_sits.HEADS}',
  )
  assert words.format(bad=bad) in result.error
  assert not (tmp_path / 'new').exists()


def test_config_names_where_it_came_from(runs_of):
  config = json.loads((runs_of['reg'] / 'config.json').read_text())
  assert config['imported']['network'].startswith('reg_xl2:')
  assert len(config['imported']['weights']) == 8
