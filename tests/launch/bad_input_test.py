"""Bad input ends a command with one line that helps, and changes nothing."""

import subprocess
import sys

import pytest

from tests.launch import commands, pictures

TOKENIZER = '--config=tests/launch/tiny.py:tokenizer'
SCALING = '--config=tests/launch/tiny.py:scaling'
GENERATOR = '--config=tests/launch/tiny.py:generator'
WORKDIR = '--workdir={new}'
TRAIN = ('train', TOKENIZER, WORKDIR)
PHOTOS = '--config.data.source=auto', '--config.data.path='
TRAIN_GENERATOR = (
  'train', GENERATOR, WORKDIR, '--config.tokenizer={runs}/tokenizer',
)  # fmt: skip
SAMPLE = (
  'sample', '--workdir={runs}/generator', '--tokenizer={runs}/scaled',
  '--out={new}', '--num_samples=2',
)  # fmt: skip
EVALUATE = 'evaluate', '--workdir={runs}/tokenizer'
EVALUATE_GENERATOR = (
  'evaluate', '--workdir={runs}/generator', '--tokenizer={runs}/scaled',
)  # fmt: skip

# A command, and what its line must say: what was given, and what was wanted.
FLAGS = {
  'unknown section': (
    (*TRAIN, '--config.foo.bar=1'),
    ('--config.foo.bar', 'tiny.py:tokenizer', '--config.model'),
  ),
  'misspelt key': (
    ('train', GENERATOR, WORKDIR, '--config.model.widht=3'),
    ('--config.model.widht', '--config.model.width'),
  ),
  'misspelt switch': (
    (*TRAIN, '--noconfig.model.cusal'),
    ('--config.model.cusal', '--config.model.causal'),
  ),
  'unknown preset': (
    ('train', '--config=configs/tokenizer.py:nope', WORKDIR),
    ("'nope'", 'quickstart, photos64, imagenet256'),
  ),
  'unknown preset of stage 2': (
    ('train', '--config=configs/scaling.py:nope', WORKDIR),
    ("'nope'", 'imagenet256_100m'),
  ),
  'config file is absent': (
    ('train', '--config=configs/nope.py', WORKDIR),
    ('configs/nope.py', 'FILE.py:PRESET'),
  ),
  'file is no config': (
    ('train', '--config=configs/base.py', WORKDIR),
    ('configs/base.py', 'get_config'),
  ),
  'word for an integer': (
    (*TRAIN, '--config.train.steps=abc'),
    ('--config.train.steps=abc', 'an integer'),
  ),
  'fraction for an integer': (
    (*TRAIN, '--config.data.batch_size=1.5'),
    ('--config.data.batch_size=1.5', 'an integer'),
  ),
  'word for a number': (
    (*TRAIN, '--config.train.ema=high'),
    ('--config.train.ema=high', 'a number'),
  ),
  'word for a switch': (
    (*TRAIN, '--config.model.causal=maybe'),
    ('--config.model.causal=maybe', 'true or false'),
  ),
  'no config': (('train', WORKDIR), ('--config', 'not given')),
  'no workdir': (('train', TOKENIZER), ('--workdir', 'not given')),
  'unknown flag': ((*TRAIN, '--wrokdir=x'), ('wrokdir', '--help')),
  'stray word': ((*TRAIN, 'stray'), ("'stray'", '--name=value')),
  'evaluate: unknown key': (
    (*EVALUATE, '--config.data.foo=1'),
    ('--config.data.foo', 'configs/evaluate.py'),
  ),
  'evaluate: no workdir': (('evaluate',), ('--workdir', 'not given')),
  'sample: no flags': (('sample',), ('--workdir, --tokenizer, --out',)),
  'quickstart: budget 0': (
    ('quickstart', WORKDIR, '--budget=0'),
    ('--budget=0', 'above 0'),
  ),
  'quickstart: endless budget': (
    ('quickstart', WORKDIR, '--budget=inf'),
    ('--budget=inf', 'above 0'),
  ),
}
VALUES = {
  'image size': (
    (*TRAIN, '--config.data.image_size=20'),
    ('data.image_size=20', 'model.patch_size=8'),
  ),
  'tokens': (
    (*TRAIN, '--config.model.num_tokens=5'),
    ('model.num_tokens=5', 'model.num_codebooks=2'),
  ),
  'batch of 0': (
    (*TRAIN, '--config.data.batch_size=0'),
    ('data.batch_size=0', 'positive'),
  ),
  'negative batch': (
    (*TRAIN, '--config.data.batch_size=-4'),
    ('data.batch_size=-4', 'positive'),
  ),
  'evaluation batch': (
    (*TRAIN, '--config.evaluation.batch_size=0'),
    ('evaluation.batch_size=0', 'positive'),
  ),
  'steps': ((*TRAIN, '--config.train.steps=0'), ('train.steps=0', '1 or more')),
  'seed': ((*TRAIN, '--config.train.seed=-1'), ('train.seed=-1', '0 or more')),
  'depth': (
    (*TRAIN, '--config.model.encoder_depth=0'),
    ('model.encoder_depth=0', '1 or more'),
  ),
  'number type': (
    (*TRAIN, '--config.model.dtype=float99'),
    ("model.dtype='float99'", 'bfloat16'),
  ),
  'decay': (
    (*TRAIN, '--config.train.ema=1'),
    ('train.ema=1', 'from 0 to below 1'),
  ),
  'rate': (
    (*TRAIN, '--config.optimizer.learning_rate=0'),
    ('optimizer.learning_rate=0', 'above 0'),
  ),
  'checkpoints': (
    (*TRAIN, '--config.checkpoint.max_to_keep=0'),
    ('checkpoint.max_to_keep=0', '1 or more'),
  ),
  'mesh': (
    (*TRAIN, '--config.mesh.fsdp=3'),
    ('mesh.fsdp=3', 'mesh.data=-1'),
  ),
  'unknown network': (
    (*TRAIN, '--config.networks.perceptual=nope'),
    ("'nope'", 'hog, random, lpips_squeeze'),
  ),
  'no weight file': (
    (*TRAIN, '--config.networks.repa_global=mobilenet_v2:/nope.npz'),
    ('/nope.npz', 'mobilenet_v2'),
  ),
  'weight file not named': (
    (*TRAIN, '--config.networks.repa_global=mobilenet_v2'),
    ('mobilenet_v2:PATH',),
  ),
  'heads': (
    (*TRAIN_GENERATOR, '--config.model.heads=3'),
    ('model.width=16', 'model.heads=3'),
  ),
  'sampler of a config': (
    (*TRAIN_GENERATOR, '--config.sampling.sampler=nope'),
    ("sampling.sampler='nope'", 'sde, ode, heun'),
  ),
  'guidance of a config': (
    (*TRAIN_GENERATOR, '--config.sampling.guidance_low=.9'),
    ('sampling.guidance_low=0.9', 'low <= high'),
  ),
  'trainable': (
    (
      'train', SCALING, WORKDIR, '--config.tokenizer={runs}/tokenizer',
      "--config.trainable=('nope',)",
    ),
    ('nope', 'local2d'),
  ),
  'label': ((*SAMPLE, '--labels=3,99'), ("'99'", 'from 0 to 9')),
  'negative label': ((*SAMPLE, '--labels=-1'), ("'-1'", 'from 0 to 9')),
  'word for a label': ((*SAMPLE, '--labels=cat'), ("'cat'", 'integers')),
  'no label': ((*SAMPLE, '--labels='), ('--labels=', 'integers')),
  'sampler': ((*SAMPLE, '--sampler=nope'), ("'nope'", 'sde, ode, heun')),
  'sampler steps': ((*SAMPLE, '--num_steps=0'), ('num_steps=0', '1 step')),
  'guidance': (
    (*SAMPLE, '--guidance_low=.8', '--guidance_high=.3'),
    ('(0.8, 0.3)', 'low <= high'),
  ),
  'sampling seed': ((*SAMPLE, '--seed=-1'), ('seed=-1', '0 to')),
  'samples': ((*SAMPLE, '--num_samples=0'), ('--num_samples=0', '1 or more')),
  'sampling batch': ((*SAMPLE, '--batch_size=0'), ('--batch_size=0', '1 or')),
  'split': ((*EVALUATE, '--config.data.split=nope'), ("'nope'", 'train, val')),
  'images': (
    (*EVALUATE, '--config.data.num_images=-1'),
    ('data.num_images=-1', '0 (all)'),
  ),
  'distance': (
    (*EVALUATE, '--config.networks.perceptual=nope'),
    ("'nope'", 'lpips_squeeze'),
  ),
  'features': (
    (*EVALUATE_GENERATOR, '--config.networks.frechet=nope'),
    ("'nope'", 'mobilenet_v2'),
  ),
}  # fmt: skip
PLACES = {
  'data: absent': (
    (*TRAIN, PHOTOS[0], PHOTOS[1] + '{bad}/absent'),
    ('{bad}/absent', 'does not exist'),
  ),
  'data: empty': (
    (*TRAIN, PHOTOS[0], PHOTOS[1] + '{bad}/empty'),
    ('{bad}/empty', 'no images'),
  ),
  'data: file': (
    (*TRAIN, PHOTOS[0], PHOTOS[1] + '{bad}/file'),
    ('{bad}/file', 'folder'),
  ),
  'data: no path': (
    ('train', '--config=configs/tokenizer.py:photos64', WORKDIR),
    ('is empty', 'folder of images'),
  ),
  'data: empty path of a folder': (
    (*TRAIN, '--config.data.source=folder', PHOTOS[1]),
    ('is empty', 'folder of images'),
  ),
  'data: unknown source': (
    (*TRAIN, '--config.data.source=nope'),
    ("'nope'", 'procedural'),
  ),
  'data: no held-out images': (
    (*TRAIN, PHOTOS[0], PHOTOS[1] + '{bad}/no_val'),
    ('val split', '{bad}/no_val'),
  ),
  'data: no classes': (
    (*TRAIN_GENERATOR, PHOTOS[0], PHOTOS[1] + '{bad}/no_image'),
    ('{bad}/no_image', 'PHOTOS/CLASS'),
  ),
  'tokenizer: not named': (
    ('train', GENERATOR, WORKDIR),
    ('tokenizer', 'runs/'),
  ),
  'stage 1: not named': (('train', SCALING, WORKDIR), ('tokenizer', 'runs/')),
  'tokenizer: no run': (
    ('train', GENERATOR, WORKDIR, '--config.tokenizer={bad}/empty'),
    ('tokenizer={bad}/empty', 'no run'),
  ),
  'tokenizer: no checkpoint': (
    ('train', GENERATOR, WORKDIR, '--config.tokenizer={bad}/no_checkpoint'),
    ('tokenizer={bad}/no_checkpoint', 'no checkpoint'),
  ),
  'tokenizer: a generator': (
    ('train', SCALING, WORKDIR, '--config.tokenizer={runs}/generator'),
    ("task 'generator'", "task 'tokenizer'"),
  ),
  'tokenizer: other images': (
    (*TRAIN_GENERATOR, '--config.data.image_size=32'),
    ('data.image_size=32', '--config.data.image_size=16'),
  ),
  'init_from: no run': (
    (*TRAIN_GENERATOR, '--config.init_from={bad}/absent'),
    ('init_from={bad}/absent', 'no run'),
  ),
  'init_from: other task': (
    (*TRAIN_GENERATOR, '--config.init_from={runs}/tokenizer'),
    ("task 'tokenizer'", "task 'generator'"),
  ),
  'init_from: other widths': (
    (
      *TRAIN_GENERATOR, '--config.init_from={runs}/generator',
      '--config.model.width=32',
    ),
    ('init_from={runs}/generator', 'does not fit'),
  ),
  'workdir: a file': (
    ('train', TOKENIZER, '--workdir={bad}/file'),
    ('--workdir={bad}/file', 'no folder'),
  ),
  'workdir: below a file': (
    ('train', TOKENIZER, '--workdir={bad}/file/run'),
    ('{bad}/file', 'no folder'),
  ),
  'workdir: of another model': (
    ('train', TOKENIZER, '--workdir={runs}/tokenizer',
     '--config.model.num_tokens=8'),
    ('model.num_tokens: 4 there, 8 given', 'another --workdir'),
  ),
  'workdir: of another task': (
    ('train', TOKENIZER, '--workdir={runs}/scaled'),
    ("task: 'scaling' there", 'another --workdir'),
  ),
  'workdir: of another seed': (
    ('train', TOKENIZER, '--workdir={runs}/tokenizer',
     '--config.train.seed=5'),
    ('train.seed: 0 there, 5 given', 'another --workdir'),
  ),
  'workdir: further on': (
    ('train', TOKENIZER, '--workdir={runs}/tokenizer',
     '--config.train.steps=1'),
    ('train.steps=1', 'step 2'),
  ),
  'out: not empty': (
    (*SAMPLE, '--out={runs}'),
    ('--out={runs}', 'not empty', 'new folder'),
  ),
  'out: below a file': (
    (*SAMPLE, '--out={bad}/file/samples'),
    ('{bad}/file', 'no folder'),
  ),
  'sample: no generator': (
    (*SAMPLE, '--workdir={runs}/tokenizer'),
    ("task 'tokenizer'", "task 'generator'"),
  ),
  'sample: no tokenizer': (
    (*SAMPLE, '--tokenizer={runs}/generator'),
    ("task 'generator'", "task 'tokenizer'"),
  ),
  'sample: other tokenizer': (
    (*SAMPLE, '--tokenizer={runs}/softvq'),
    ('{runs}/generator', 'another tokenizer'),
  ),
  'evaluate: no run': (
    ('evaluate', '--workdir={bad}/absent'),
    ('--workdir={bad}/absent', 'no run'),
  ),
  'evaluate: tokenizer not named': (
    ('evaluate', '--workdir={runs}/generator'),
    ('--tokenizer', 'not given'),
  ),
  'evaluate: broken image': (
    (*EVALUATE, PHOTOS[1] + '{bad}/no_image_val'),
    ('{bad}/no_image_val/val/x.jpg', 'no image'),
  ),
  'quickstart: a file': (
    ('quickstart', '--workdir={bad}/file'),
    ('--workdir={bad}/file', 'no folder'),
  ),
}  # fmt: skip
# These are found on the way; by then the workdir is there.
LATE = {
  'no image': ('no_image', 'train/x.jpg'),
  'cut short': ('cut_short', 'train/0.jpg'),
  'no image among the held out': ('no_image_val', 'val/x.jpg'),
}


@pytest.fixture(scope='module')
def bad(runs, tmp_path_factory):
  """A folder of everything that is not as it should be."""
  folder = tmp_path_factory.mktemp('bad')
  (folder / 'empty').mkdir()
  (folder / 'file').write_text('neither folder nor tar')
  (folder / 'no_checkpoint').mkdir()
  config = (runs / 'tokenizer' / 'config.json').read_text()
  (folder / 'no_checkpoint' / 'config.json').write_text(config)
  for name in ('no_image', 'cut_short', 'no_image_val', 'no_val'):
    for split in ('train', 'val'):
      pictures.write(folder / name / split, 4)
  for file in (folder / 'no_val' / 'val').iterdir():
    file.unlink()
  (folder / 'no_image' / 'train' / 'x.jpg').write_text('hello')
  (folder / 'no_image_val' / 'val' / 'x.jpg').write_text('hello')
  pictures.truncate(folder / 'cut_short' / 'train' / '0.jpg')
  return folder


@pytest.mark.parametrize(
  'cases', [FLAGS, VALUES, PLACES], ids=['flags', 'values', 'places']
)
def test_one_line_and_nothing_written(cases, server, runs, bad, tmp_path):
  before = {folder: pictures.contents(folder) for folder in (runs, bad)}
  wrong = {}
  for name, (command, wanted) in cases.items():
    places = {'runs': runs, 'bad': bad, 'new': tmp_path / 'new'}
    result = server.run(*(word.format(**places) for word in command))
    missing = [
      text
      for text in (word.format(**places) for word in wanted)
      if text not in result.error
    ]
    if missing or result.out or result.err != f'{result.error}\n':
      wrong[name] = (missing, result)
    if (tmp_path / 'new').exists():
      wrong[name] = ('written', list((tmp_path / 'new').iterdir()))
  assert not wrong
  for folder, contents in before.items():
    assert pictures.contents(folder) == contents


@pytest.mark.parametrize('name', LATE)
def test_broken_image_ends_training(name, server, bad, tmp_path):
  folder, file = LATE[name]
  result = server.run(
    'train',
    TOKENIZER,
    f'--workdir={tmp_path}',
    '--config.data.source=auto',
    f'--config.data.path={bad / folder}',
    '--config.evaluation.num_images=0',
  )
  assert f'{bad / folder / file} is no image' in result.error
  assert result.code == 1


def test_batch_that_devices_cannot_share(server, tmp_path):
  devices = '--xla_force_host_platform_device_count=3'
  result = server.run(
    'train', TOKENIZER, f'--workdir={tmp_path / "new"}', XLA_FLAGS=devices
  )
  assert 'data.batch_size=4 does not divide over 3 devices' in result.error
  assert not (tmp_path / 'new').exists()


def test_damaged_config_of_a_run(server, tmp_path):
  (tmp_path / 'config.json').write_text('{"task": ')
  result = server.run('train', TOKENIZER, f'--workdir={tmp_path}')
  assert 'config.json is damaged' in result.error
  assert (tmp_path / 'config.json').read_text() == '{"task": '


def test_commands_of_a_shell(tmp_path):
  """The same, without any of this folder's machinery."""
  processes = {
    wanted: subprocess.Popen(
      [sys.executable, '-m', f'launch.{module}', *arguments],
      cwd=commands.ROOT,
      env=commands.environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for wanted, module, *arguments in (
      ('--config.foo.bar is no key', 'train', TOKENIZER, '--config.foo.bar=1'),
      ('/absent does not exist', 'train', TOKENIZER,
       f'--workdir={tmp_path / "new"}', '--config.data.source=auto',
       f'--config.data.path={tmp_path}/absent'),
      ('/absent is no run', 'evaluate', f'--workdir={tmp_path}/absent'),
    )
  }  # fmt: skip
  for wanted, process in processes.items():
    out, err = process.communicate(timeout=120)
    assert process.returncode in (1, 2)
    assert out == ''
    assert err.count('\n') == 1
    assert err.startswith('error: ')
    assert wanted in err
  assert not list(tmp_path.iterdir())


def test_limits_name_keys_that_there_are():
  from configs import generator, scaling, tokenizer
  from launch import limits
  from selfboottok_jax.training import checkpointing

  known = set()
  for module in (tokenizer, scaling, generator):
    for preset in module.PRESETS:
      config = checkpointing.flatten(module.get_config(preset).to_dict())
      limits.check(config)
      known |= config.keys()
  named = {
    *limits.LEAST, *limits.MOST, *limits.POSITIVE, *limits.DECAYS,
    *limits.CHOICES,
  }  # fmt: skip
  assert named <= known
