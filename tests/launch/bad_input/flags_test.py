from tests.launch import commands
from tests.launch.bad_input.arguments import (
  EVALUATE,
  GENERATOR,
  TOKENIZER,
  TRAIN,
  WORKDIR,
)

# A command, and what its line must say: what was given, and what was wanted.
CASES = {
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
    ("'nope'", 'quickstart, photos64, ', 'imagenet256_softvq'),
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
    ('train', '--config=tests/tiny.py', WORKDIR),
    ('tests/tiny.py', 'get_config'),
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
    ('--config.data.foo', 'presets/evaluate.py'),
  ),
  'evaluate: no workdir': (('evaluate',), ('--workdir', 'wanted one of them')),
  'multihost: port is missing': (
    (*TRAIN, '--multihost'),
    ("JAX_COORDINATOR_ADDRESS='localhost'", 'HOST:PORT'),
    {'JAX_COORDINATOR_ADDRESS': 'localhost'},
  ),
  'multihost: one of three': (
    (*TRAIN, '--multihost'),
    ("JAX_PROCESS_ID=''", 'integers'),
    {'JAX_COORDINATOR_ADDRESS': 'localhost:1', 'JAX_NUM_PROCESSES': '2'},
  ),
  'multihost: alone': ((*TRAIN, '--multihost'), ('no other processes',)),
  'devices of a training': (
    (*TRAIN, '--devices=2'),
    ('--devices=2', 'dry_run'),
  ),
  'no devices': (
    (*TRAIN, '--dry_run', '--devices=0'),
    ('--devices=0', '1 or more'),
  ),
  'devices and hosts': (
    (*TRAIN, '--dry_run', '--devices=2', '--multihost'),
    ('--multihost', 'one process'),
  ),
  'topology of a training': (
    (*TRAIN, '--topology=v5e:2x2'),
    ('--topology', '--dry_run'),
  ),
  'json of a training': ((*TRAIN, '--json'), ('--json', '--dry_run')),
  'topology and devices': (
    (*TRAIN, '--dry_run', '--topology=h100:8', '--devices=8'),
    ('--topology=h100:8', 'leave --devices out'),
  ),
  'topology and hosts': (
    (*TRAIN, '--dry_run', '--topology=h100:8', '--multihost'),
    ('--topology=h100:8', 'leave --multihost out'),
  ),
  'unknown chip': (
    (*TRAIN, '--dry_run', '--topology=v9:8'),
    ("no chip 'v9'", 'v5p', 'h100'),
  ),
  'unknown slice': (
    (*TRAIN, '--dry_run', '--topology=v5p:4x4'),
    ('no slice', 'v5p:4x4x4'),
  ),
  'sample: no flags': (('sample',), ('--workdir, --tokenizer, --out',)),
  'benchmark: no config': (('benchmark',), ('--config', 'not given')),
  'benchmark: no steps': (
    ('benchmark', TOKENIZER, '--steps=0'),
    ('--steps=0', '1 or more'),
  ),
  'benchmark: no rounds': (
    ('benchmark', TOKENIZER, '--rounds=-1'),
    ('--rounds=-1', '1 or more'),
  ),
  'quickstart: budget 0': (
    ('quickstart', WORKDIR, '--budget=0'),
    ('--budget=0', 'above 0'),
  ),
  'quickstart: endless budget': (
    ('quickstart', WORKDIR, '--budget=inf'),
    ('--budget=inf', 'above 0'),
  ),
}


def test_flags(refused):
  refused(CASES)


def test_commands_of_a_shell(tmp_path):
  """The same, without any of this folder's machinery."""
  processes = {
    wanted: commands.spawn(module, *arguments)
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
