import json
import resource

import pytest

from tests.launch import commands

TINY = '--config=tests/launch/tiny.py:'


def _card(result):
  assert result.code == 0, result.err
  return json.loads(result.out.splitlines()[-1])


def _sum(card, *keys):
  values = card['rows']
  for key in keys:
    values = [value[key] for value in values]
  return sum(values)


@pytest.mark.slow
def test_tells_the_cost_and_writes_nothing(server, tmp_path):
  workdir = tmp_path / 'new'
  result = server.run(
    'train', f'{TINY}tokenizer', f'--workdir={workdir}', '--dry_run'
  )
  card = _card(result)
  assert not workdir.exists()
  components = [row['component'] for row in card['rows']]
  assert {'encoder', 'decoder', 'discriminator', 'transport'} <= {*components}
  total = next(x for x in result.out.splitlines() if x.startswith('total '))
  assert f'{_sum(card, "parameters"):,}' in total
  by_name = {row['component']: row for row in card['rows']}
  for name in ('encoder', 'decoder', 'local2d', 'discriminator'):
    step = by_name[name]['flops']
    assert by_name[name]['trained']
    assert 0 < step['forward'] < step['backward'], name
  assert not by_name['transport']['trained']
  assert card['memory']['temporary'] > 0
  assert card['compile_seconds'] > 0


@pytest.mark.slow
def test_without_data_and_tokenizer_on_made_up_devices(server, runs):
  # Wide enough to be sharded.
  arguments = (
    'train', f'{TINY}generator', '--dry_run', '--config.model.width=128',
    '--config.data.batch_size=8',
  )  # fmt: skip
  alone = server.run(*arguments, '--devices=1', '--config.data.source=auto')
  assert 'assumed: images of 1,000 classes (data.path is empty)' in alone.out
  assert (
    'assumed: the tokenizer of configs/tokenizer.py:quickstart' in alone.out
  )
  assert '1 x cpu' in alone.out
  given = server.run(
    *arguments,
    f'--config.tokenizer={runs / "tokenizer"}',
    '--devices=4',
    '--config.mesh.fsdp=4',
  )
  assert 'assumed' not in given.out
  assert '4 x cpu (mesh: data 1 x fsdp 4)' in given.out
  one, four = _card(alone), _card(given)
  assert four['memory']['batch'] * 4 == one['memory']['batch']
  assert four['memory']['state'] < one['memory']['state'] / 2
  # Ten classes are known, a thousand were assumed: label embeddings only.
  assert _sum(one, 'parameters') - _sum(four, 'parameters') == 990 * 128
  assert _sum(one, 'flops', 'backward') == _sum(four, 'flops', 'backward')


GIB = 2**30
# Stage 2 loads no teacher of tokens that it cannot change.
SHARED = {'perceptual', 'transport', 'discriminator_trunk'}
FROZEN = {
  'tokenizer.py:imagenet256': SHARED | {'repa_global', 'repa_local'},
  'scaling.py:imagenet256_600m': SHARED,
  'generator.py:imagenet256_xl': set(),
}
NETWORKS = SHARED | {'repa_global', 'repa_local'}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'parameters'),
  [
    pytest.param('tokenizer.py:imagenet256', 1_254.6e6, marks=pytest.mark.long),
    pytest.param(
      'scaling.py:imagenet256_600m', 895.8e6, marks=pytest.mark.long
    ),
    ('generator.py:imagenet256_xl', 857.5e6),
  ],
)
def test_the_largest_presets_fit_a_laptop(config, parameters):
  with commands.spawn(
    'train', f'--config=configs/{config}', '--dry_run', '--devices=8'
  ) as process:
    out, err = process.communicate()
  assert process.returncode == 0, err
  card = json.loads(out.splitlines()[-1])
  assert _sum(card, 'parameters') == pytest.approx(parameters, rel=0.01)
  frozen = {r['component'] for r in card['rows'] if not r['trained']}
  assert frozen & NETWORKS == FROZEN[config]
  # Weights, running means and moments would be four times the parameters.
  # The most of any process that ended.
  used = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
  assert used < min(4 * GIB, 16 * parameters)
