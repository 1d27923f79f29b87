"""Images that are no squares, from a command line to pictures on a disk."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import data, errors, inference
from selfboottok_jax.training import checkpointing
from tests.launch import commands, logs

TINY = '--config=tests/launch/tiny.py:'
# 3 rows and 2 columns of patches of 8 pixels.
SIZE = (24, 16)
FLAG = '--config.data.image_size=24,16'


@pytest.mark.slow
@pytest.mark.long
def test_flags_take_a_number_or_two():
  program = (
    'import sys\n'
    'from launch import cli, train\n'
    'from selfboottok_jax.stages import checks\n'
    'def main():\n'
    '  config = train._CONFIG.value\n'
    '  checks.check(config)\n'
    '  print(repr(config.data.image_size), config.model.num_tokens)\n'
    'cli.run(main, train.FLAGS)\n'
  )
  for arguments, wanted in (
    ([], '32 16'),
    (['--config.data.image_size=64'], '64 16'),
    (['--config.data.image_size', '64'], '64 16'),
    (['--config.data.image_size=(96, 64)'], '(96, 64) 16'),
    (['--config.data.image_size=96,64'], '(96, 64) 16'),
    (['--config.data.image_size=96x64'], '(96, 64) 16'),
    # A default follows, in whatever order flags come; a number does not.
    (
      ['--config.model.patch_size=16', '--config.data.image_size=48,32'],
      '(48, 32) 12',
    ),
    (
      ['--config.model.num_tokens=24', '--config.data.image_size=48,32'],
      '(48, 32) 24',
    ),
  ):
    result = subprocess.run(
      [
        *(sys.executable, '-c', program),
        *('--config=configs/tokenizer.py:quickstart', *arguments),
      ],
      cwd=commands.ROOT,
      env=commands.environment(),
      capture_output=True,
      text=True,
    )
    assert result.stdout.strip() == wanted, result.stderr


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--config.data.image_size=big'], ('image_size=big', '(height, width)')),
    (['--config.data.image_size=24,16,3'], ('(24, 16, 3)', '1 or more')),
    (['--config.data.image_size=0x16'], ('(0, 16)', '1 or more')),
    (['--config.data.image_size=24,20'], ('(24, 20)', 'model.patch_size=8')),
    # Four tokens, which somebody chose, and six patches.
    (
      [FLAG, '--config.model.num_tokens=4'],
      ('model.num_tokens=4', '6 patches', '--config.model.num_tokens=6'),
    ),
    # No multiple of 4 is near that divides 6.
    (
      [FLAG, '--config.model.num_codebooks=4'],
      ('num_codebooks=4', 'multiple of 6', '--config.loss.repa_mode=global'),
    ),
  ],
)
def test_what_does_not_fit_names_its_key(flags, said, server, tmp_path):
  workdir = tmp_path / 'run'
  result = server.run(
    'train', f'{TINY}tokenizer', f'--workdir={workdir}', *flags
  )
  for part in said:
    assert part in result.error
  assert not workdir.exists()


@pytest.fixture(scope='module')
def trained(server, tmp_path_factory):
  """The three trainings, on scenes of 24 x 16 pixels."""
  folder = tmp_path_factory.mktemp('rectangles')
  tokenizer = f'--config.tokenizer={folder / "tokenizer"}'
  for task, more in (
    ('tokenizer', ()),
    ('scaling', (tokenizer,)),
    ('generator', (tokenizer, '--config.evaluation.num_samples=4')),
  ):
    result = server.run(
      'train', f'{TINY}{task}', f'--workdir={folder / task}', FLAG, *more
    )
    assert result.code == 0, result.err
  return folder


@pytest.mark.long
@pytest.mark.slow
def test_all_three_stages_train(trained):
  for task in ('tokenizer', 'scaling', 'generator'):
    config = checkpointing.read_config(str(trained / task), 'test')
    assert config['data']['image_size'] == list(SIZE)
    records = [r for r in logs.read(trained / task) if 'loss' in r]
    assert [r['step'] for r in records] == [1, 2]
    assert all(np.isfinite(r['loss']) for r in records)
  # The default followed the six patches.
  config = checkpointing.read_config(str(trained / 'tokenizer'), 'test')
  assert config['model']['num_tokens'] == 6


@pytest.mark.slow
@pytest.mark.long
def test_an_autoencoder_takes_the_generators_rectangle(server, tmp_path):
  """In every command; by itself its images are squares of 256 pixels."""
  tokenizer = 'vavae_tiny:random'
  workdir = f'--workdir={tmp_path / "run"}'
  result = server.run(
    'train',
    f'{TINY}generator',
    f'--config.tokenizer={tokenizer}',
    '--config.data.image_size=32,48',
    workdir,
  )
  assert result.code == 0, result.err
  config = checkpointing.read_config(str(tmp_path / 'run'), 'test')
  assert config['model']['positions'] == '2x3'
  out = tmp_path / 'samples'
  result = server.run(
    *('sample', workdir, f'--tokenizer={tokenizer}', f'--out={out}'),
    '--num_samples=2',
  )
  assert result.code == 0, result.err
  for file in (out / 'images').iterdir():
    with Image.open(file) as image:
      assert image.size == (48, 32)
  loaded = inference.load_tokenizer(tokenizer, image_size=[32, 48])
  assert (loaded.image_size, loaded.num_tokens) == ((32, 48), 6)


@pytest.mark.slow
@pytest.mark.long
def test_a_run_continues_with_its_size_alone(server, trained):
  workdir = f'--workdir={trained / "tokenizer"}'
  again = server.run('train', f'{TINY}tokenizer', workdir, FLAG)
  assert again.code == 0, again.err
  other = server.run(
    'train', f'{TINY}tokenizer', workdir, '--config.data.image_size=16,24'
  )
  assert 'data.image_size: [24, 16] there, [16, 24] given' in other.error


@pytest.mark.slow
@pytest.mark.long
def test_a_tokenizer_takes_its_own_rectangle_alone(trained, unchecked):
  tokenizer = inference.load_tokenizer(trained / 'tokenizer')
  assert tokenizer.image_size == SIZE
  scenes = data.open_source('procedural', '', 'val', SIZE)
  images = np.stack([scenes[i]['image'] for i in range(3)])
  codes = tokenizer.encode(images)
  assert codes.shape == (3, 6, 8)
  decoded = tokenizer.decode(codes)
  assert decoded.shape == (3, *SIZE, 3)
  jitted = jax.jit(lambda x: tokenizer.decode(tokenizer.encode(x)))(images)
  np.testing.assert_allclose(jitted, decoded, atol=1e-4)
  # As many pixels, lying.
  lying = images.transpose(0, 2, 1, 3)
  with pytest.raises(errors.UserError, match=r'wanted \[b, 24, 16, 3\]'):
    unchecked(tokenizer.encode, lying)
  scaled = inference.load_tokenizer(trained / 'scaling')
  assert scaled.fingerprint == tokenizer.fingerprint
  np.testing.assert_allclose(scaled.encode(images), codes, atol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_a_cache_is_of_one_rectangle(server, trained, tmp_path):
  cache = tmp_path / 'cache'
  arguments = (
    f'{TINY}generator',
    f'--config.tokenizer={trained / "tokenizer"}',
  )
  # The built-in scenes are many; photographs of another aspect are few.
  photos = tmp_path / 'photos'
  rng = np.random.default_rng(0)
  for split in ('train', 'val'):
    for name in ('cat', 'dog'):
      folder = photos / split / name
      folder.mkdir(parents=True)
      for i in range(3):
        picture = rng.integers(0, 256, (20, 40, 3), np.uint8)
        Image.fromarray(picture).save(folder / f'{i}.png')
  images = ('--config.data.source=auto', f'--config.data.path={photos}')
  result = server.run(
    'encode', *arguments, *images, FLAG, f'--out={cache}', '--batch_size=2'
  )
  assert result.code == 0, result.err
  index = json.loads((cache / 'cache.json').read_text())
  assert index['image_size'] == list(SIZE)
  assert data.open_token_cache(cache, 'train').image_size == SIZE
  # The same command finds it complete.
  result = server.run(
    'encode', *arguments, *images, FLAG, f'--out={cache}', '--batch_size=2'
  )
  assert '0 of 1 shards are new' in result.out, result.err
  result = server.run(
    'train',
    *arguments,
    f'--config.data.cache={cache}',
    f'--workdir={tmp_path / "run"}',
    '--config.data.source=auto',
    FLAG,
  )
  assert result.code == 0, result.err


@pytest.mark.slow
@pytest.mark.long
def test_samples_scores_and_the_page_are_of_rectangles(
  server, trained, tmp_path
):
  generator = (
    f'--workdir={trained / "generator"}',
    f'--tokenizer={trained / "scaling"}',
  )
  out = tmp_path / 'samples'
  result = server.run(
    'sample', *generator, f'--out={out}', '--num_samples=3', '--npz'
  )
  assert result.code == 0, result.err
  files = sorted((out / 'images').iterdir())
  assert len(files) == 3
  for file in files:
    with Image.open(file) as image:
      assert image.size == SIZE[::-1]
  with np.load(out / 'samples.npz') as arrays:
    assert arrays['arr_0'].shape == (3, *SIZE, 3)
  scored = server.run(
    'evaluate',
    *generator,
    *('--config.num_samples=8', '--config.data.num_images=8'),
    '--config.data.batch_size=4',
  )
  assert scored.code == 0, scored.err
  scored = server.run(
    'evaluate',
    f'--workdir={trained / "tokenizer"}',
    *('--config.data.num_images=8', '--metrics=psnr,ssim,distance_hog'),
  )
  assert scored.code == 0, scored.err
  scores = json.loads((trained / 'tokenizer' / 'scores.json').read_text())
  assert {'psnr', 'ssim'} <= {score['metric'] for score in scores}
  result = server.run(
    'report',
    f'--runs={trained / "tokenizer"},{trained / "generator"}',
    f'--tokenizer={trained / "scaling"}',
    f'--out={tmp_path / "page"}',
    '--per_class=2',
  )
  assert result.code == 0, result.err
  with Image.open(tmp_path / 'page' / 'samples.png') as image:
    # Thumbnails, six times the size, in a column for each class.
    assert image.height >= 2 * 4 * SIZE[0]
    assert image.width >= 4 * SIZE[1]
