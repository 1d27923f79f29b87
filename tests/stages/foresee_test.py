import dataclasses
import importlib.util
import json

import pytest

from selfboottok_jax import errors, placement
from selfboottok_jax.stages import foresee, topology
from tests.launch import commands, tiny

TINY = '--config=tests/launch/tiny.py:'
# Those that the line of JSON has in any case.
KEYS = {
  *('chips', 'bytes_per_chip', 'chip_bytes', 'flops_per_step'),
  *('collective_bytes', 'roofline_seconds', 'mfu_bound', 'hours'),
}


class _SeenError(Exception):
  pass


@pytest.mark.parametrize(
  ('words', 'wanted'),
  [
    ('memory required for HLO temporaries (30.50G) exceeds it', 30.5 * 2**30),
    ('Used 20.00M of 15.75G hbm', 20 * 2**20),
    ('no number', 0),
  ],
)
def test_the_compiler_says_how_much_it_wanted(words, wanted):
  assert foresee.NoRoomError(words).bytes == wanted


@pytest.mark.parametrize(
  ('name', 'emulated', 'platform', 'attention'),
  [
    ('v5e:4x4', False, 'tpu', 'splash'),
    # After a refusal CPU devices stand for a TPU, and cannot run its kernels.
    ('v5e:4x4', True, 'gpu', 'auto'),
    ('h100:8', True, 'gpu', 'auto'),
  ],
)
def test_kernels_are_those_of_what_compiles(
  name, emulated, platform, attention, monkeypatch
):
  config = tiny.get_config('generator')
  config.model.attention = 'splash'
  where = dataclasses.replace(topology.parse(name), emulated=emulated)
  seen = []

  def measure(config, *_):
    seen.append((placement.platform(), config.model.attention))
    raise _SeenError

  monkeypatch.setattr(foresee, '_measure_here', measure)
  with pytest.raises(_SeenError):
    foresee._measure(config, where, False)
  assert seen == [(platform, attention)]


def test_what_cannot_be_foreseen_is_refused_before_anything_starts():
  config = tiny.get_config('generator')
  with pytest.raises(errors.ConfigError, match='no slice'):
    foresee.foresee(config, 'v5e:3x3')


@pytest.mark.slow
def test_gpus_from_the_command_line(server):
  result = server.run(
    *('train', f'{TINY}tokenizer', '--dry_run', '--topology=h100:4'),
    *('--config.mesh.fsdp=2', '--config.data.batch_size=8', '--json'),
    '--config.model.encoder_width=128',
    '--nolargest_batch',
  )
  assert result.code == 0, result.err
  (line,) = result.out.splitlines()
  values = json.loads(line)
  assert values.keys() >= KEYS
  assert values['chips'] == 4
  assert values['mesh'] == {'data': 2, 'fsdp': 2}
  assert not values['compiled']
  assert values['fits']
  # All is computed; XLA leaves out a few products of tiny matrices.
  executed = sum(values['flops_per_chip'].values())
  assert executed >= 0.99 * values['flops_per_step'] / 4
  assert values['collective_bytes'] > 0
  assert {tuple(c['axes']) for c in values['collectives']} >= {('fsdp',)}
  assert 0 < values['mfu_bound'] < 1


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['none', 'dots'])
def test_weights_travel_in_the_type_of_their_products(server, remat):
  result = server.run(
    *('train', f'{TINY}generator', '--dry_run', '--topology=h100:8'),
    *('--config.mesh.fsdp=8', '--config.data.batch_size=8', '--json'),
    *('--config.model.width=128', '--config.model.dtype=bfloat16'),
    *('--config.assumed.cache=True', '--config.data.image_size=32'),
    '--config.assumed.tokenizer=quickstart',
    *(f'--config.model.remat={remat}', '--nolargest_batch'),
  )
  assert result.code == 0, result.err
  values = json.loads(result.out)
  # Gathered in float32 it would be five thirds; gathered once, two thirds.
  share = values['collective_bytes'] / values['least_collective_bytes']
  assert 0.9 < share < 1.3


@pytest.mark.slow
def test_a_mesh_that_does_not_fit_is_refused(server):
  result = server.run(
    *('train', f'{TINY}tokenizer', '--dry_run', '--topology=h100:2'),
    '--config.mesh.fsdp=3',
  )
  assert 'is not the 2 devices' in result.error


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu, of the extra `tpu`, is not installed',
)
def test_tpus_from_the_command_line():
  with commands.spawn(
    *('train', f'{TINY}tokenizer', '--dry_run', '--topology=v5e:2x2'),
    *('--config.mesh.fsdp=2', '--config.data.batch_size=8'),
    *('--config.model.dtype=bfloat16', '--nolargest_batch'),
  ) as process:
    out, err = process.communicate()
  assert process.returncode == 0, err
  assert not err
  values = json.loads(out.splitlines()[-1])
  assert values['compiled']
  executed = sum(values['flops_per_chip'].values())
  assert executed >= 0.99 * values['flops_per_step'] / 4
