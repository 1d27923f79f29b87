"""Places that are not on this machine, and the home folder."""

import pytest

from tests.launch.bad_input.arguments import (
  GENERATOR,
  SAMPLE,
  SCALING,
  TOKENIZER,
  TRAIN,
  TRAIN_GENERATOR,
  WORKDIR,
)

ENCODE = (
  'encode', GENERATOR, '--config.tokenizer={runs}/tokenizer',
)  # fmt: skip
# A command, and what its line must say: what was given, and what was wanted.
CASES = {
  'workdir: another store': (
    ('train', TOKENIZER, '--workdir=s3://bucket/run'),
    ('s3://bucket/run', 'gs://BUCKET/NAME'),
  ),
  'workdir: no bucket': (
    ('train', TOKENIZER, '--workdir=gs:///'),
    ('gs:///', 'names no bucket'),
  ),
  'workdir: absent bucket': (
    ('train', TOKENIZER, '--workdir=gs://absent-bucket/run'),
    ('--workdir=gs://absent-bucket/run cannot be written', 'no such bucket'),
  ),
  'out: absent bucket': (
    (*SAMPLE, '--out=gs://absent-bucket/samples'),
    ('--out=gs://absent-bucket/samples', 'no such bucket'),
  ),
  'tokenizer: no run': (
    ('train', SCALING, WORKDIR, '--config.tokenizer=gs://absent-bucket/tok'),
    ('tokenizer=gs://absent-bucket/tok', 'no run'),
  ),
  'init_from: no run': (
    (*TRAIN_GENERATOR, '--config.init_from=gs://absent-bucket/tok'),
    ('init_from=gs://absent-bucket/tok', 'no run'),
  ),
  'runs: no run': (
    ('report', '--runs=gs://absent-bucket/tok', '--out={new}'),
    ('--runs=gs://absent-bucket/tok', 'no run'),
  ),
  'encode: out': (
    (*ENCODE, '--out=gs://bucket/cache'),
    ('--out=gs://bucket/cache', 'local disks alone', 'gcloud storage cp'),
  ),
  'cache': (
    (*TRAIN_GENERATOR, '--config.data.cache=gs://bucket/cache'),
    ('data.cache=gs://bucket/cache', 'local disks alone', 'gcloud storage cp'),
  ),
  'records': (
    (*TRAIN, '--config.data.source=records',
     '--config.data.path=gs://bucket/imagenet'),
    ('data.path=gs://bucket/imagenet', 'local disks alone'),
  ),
  'prepare: out': (
    ('prepare', '--path=x', '--out=gs://bucket/imagenet'),
    ('--out=gs://bucket/imagenet', 'local disks alone'),
  ),
  'weights': (
    (*TRAIN, '--config.networks.perceptual=lpips_vgg:gs://bucket/vgg.pth',
     '--config.loss.perceptual=1.0'),
    ('lpips_vgg=gs://bucket/vgg.pth', 'local disks alone'),
  ),
  'convert: out': (
    ('convert', '--network=lpips_vgg', '--out=gs://bucket/vgg'),
    ('--out=gs://bucket/vgg', 'local disks alone'),
  ),
  'cache of weights': (
    ('convert', '--network=lpips_vgg'),
    ('SELFBOOTTOK_CACHE=gs://bucket/weights', 'local disks alone'),
    {'SELFBOOTTOK_CACHE': 'gs://bucket/weights'},
  ),
}  # fmt: skip


def test_what_is_elsewhere(refused, store):
  refused(
    {
      name: (command, wanted, store.variables | dict(*variables))
      for name, (command, wanted, *variables) in CASES.items()
    }
  )


@pytest.fixture
def home(runs, tmp_path):
  """A home folder with runs."""
  folder = tmp_path / 'a home'
  folder.mkdir()
  (folder / 'runs').symlink_to(runs)
  (folder / 'file').write_text('neither folder nor tar')
  return folder


def test_the_home_folder(refused, home):
  """Each command says what it found there."""
  generator = ('train', GENERATOR, WORKDIR)
  own = '--config.tokenizer=~/runs/tokenizer'
  cases = {
    'config': (
      ('train', '--config=~/absent.py:x', WORKDIR),
      (f'no file {home}/absent.py',),
    ),
    'workdir': (
      ('train', TOKENIZER, '--workdir=~/runs/tokenizer',
       '--config.train.steps=1'),
      ('--workdir=~/runs/tokenizer is at step 2',),
    ),
    'tokenizer': (
      (*generator, '--config.tokenizer=~/runs/generator'),
      ("tokenizer=~/runs/generator is a run of task 'generator'",),
    ),
    'init_from': (
      (*generator, own, '--config.init_from=~/runs/scaled'),
      ("init_from=~/runs/scaled is a run of task 'scaling'",),
    ),
    'path': (
      (*generator, own, '--config.data.source=auto',
       '--config.data.path=~/absent'),
      (f'{home}/absent does not exist',),
    ),
    'cache': (
      (*generator, own, '--config.data.cache=~/runs'),
      (f'{home}/runs is no token cache',),
    ),
    'weights': (
      (*TRAIN, '--config.networks.perceptual=lpips_vgg:~/absent.pth',
       '--config.loss.perceptual=1.0'),
      (f"no weight file at '{home}/absent.pth'",),
    ),
    'encode: out': (
      (*ENCODE, '--out=~/runs'),
      (f'--out={home}/runs is not empty',),
    ),
    'sample: workdir': (
      (*SAMPLE, '--workdir=~/runs/softvq'),
      ("workdir=~/runs/softvq is a run of task 'tokenizer'",),
    ),
    'sample: tokenizer': (
      (*SAMPLE, '--tokenizer=~/runs/generator'),
      ("workdir=~/runs/generator is a run of task 'generator'",),
    ),
    'sample: out': (
      (*SAMPLE, '--out=~/runs'),
      (f'--out={home}/runs is not empty',),
    ),
    'evaluate': (
      ('evaluate', '--workdir=~/runs/generator'),
      ('--tokenizer not given; ~/runs/generator is a generator',),
    ),
    'evaluate: tokenizer': (
      ('evaluate', '--workdir=~/runs/generator',
       '--tokenizer=~/runs/generator'),
      ("~/runs/generator is a run of task 'generator'",),
    ),
    'report: runs': (
      ('report', '--runs=~/runs/softvq,~/runs', '--out={new}'),
      ('--runs=~/runs is no run',),
    ),
    'report: out': (
      ('report', '--runs={runs}/softvq', '--out=~/file/page'),
      (f'{home}/file is no folder',),
    ),
    'quickstart': (
      ('quickstart', '--workdir=~/runs', '--budget=9'),
      (f'--workdir={home}/runs holds a quickstart of another --budget',),
    ),
    'benchmark': (
      ('benchmark', TOKENIZER, '--out=~/runs'),
      ('--out=~/runs is a folder',),
    ),
    'convert': (
      ('convert', '--network=lpips_vgg', '--out=~/runs'),
      (f'--out={home}/runs is there already',),
    ),
    'import_softvq': (
      ('import_softvq', '--network=softvq:~/absent.pth', WORKDIR),
      (f"no weight file at '{home}/absent.pth'",),
    ),
    'import_softvq: workdir': (
      ('import_softvq', '--network=softvq:{bad}/absent.pth',
       '--workdir=~/file'),
      (f'{home}/file is no folder',),
    ),
    'import_generator': (
      ('import_generator', '--network=sit_xl2:~/absent.pth', WORKDIR),
      (f"no weight file at '{home}/absent.pth'",),
    ),
  }  # fmt: skip
  refused({name: (*case, {'HOME': str(home)}) for name, case in cases.items()})
