import pytest

from tests.launch.bad_input.arguments import (
  EVALUATE,
  GENERATOR,
  PHOTOS,
  SAMPLE,
  SCALING,
  TOKENIZER,
  TRAIN,
  TRAIN_GENERATOR,
  WORKDIR,
)

# A command, and what its line must say: what was given, and what was wanted.
CASES = {
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
  'init_from: no run in a dry run': (
    (*TRAIN, '--dry_run', '--config.init_from={bad}/absent'),
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
  'init_from: scaled from another tokenizer': (
    (
      'train', SCALING, WORKDIR, '--config.tokenizer={runs}/softvq',
      '--config.init_from={runs}/scaled',
    ),
    ('init_from={runs}/scaled', 'another tokenizer', '{runs}/softvq'),
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
  'benchmark: below a file': (
    ('benchmark', TOKENIZER, '--out={bad}/file/x.json'),
    ('{bad}/file', 'no folder'),
  ),
  'dry run: no data, no tokenizer': (
    ('train', SCALING, '--dry_run', PHOTOS[0], PHOTOS[1] + '{bad}/absent'),
    ('{bad}/absent', 'does not exist'),
  ),
  'benchmark: a folder': (
    ('benchmark', TOKENIZER, '--out={bad}/empty'),
    ('--out={bad}/empty', 'wanted a file'),
  ),
  'benchmark: no data': (
    ('benchmark', TOKENIZER, '--config.data.source=auto',
     '--config.data.path={bad}/absent'),
    ('{bad}/absent', 'does not exist'),
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


def test_places(refused):
  refused(CASES)


@pytest.mark.slow
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


def test_damaged_config_of_a_run(server, tmp_path):
  (tmp_path / 'config.json').write_text('{"task": ')
  result = server.run('train', TOKENIZER, f'--workdir={tmp_path}')
  assert 'config.json is damaged' in result.error
  assert (tmp_path / 'config.json').read_text() == '{"task": '
