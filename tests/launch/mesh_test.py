"""The same losses on any mesh."""

import os

import numpy as np
import pytest

from selfboottok_jax.training import sharding
from tests.launch import logs

MESHES = [(8, 1), (2, 4)]
BATCH, STEPS, TOLERANCE = 16, 5, 1e-5
# Wide enough that the shape rule shards kernels.
WIDTH = 128
assert WIDTH * WIDTH >= sharding.MIN_SIZE
FIELDS = {
  'tokenizer': ('encoder_width', 'decoder_width'),
  'scaling': ('local2d_width',),
  'generator': ('width',),
}


# A batch norm that saw a device's share alone would tell another loss.
KINDS = {
  **{task: (task, ()) for task in FIELDS},
  'dino': ('tokenizer', ('--config.discriminator.kind=dino',)),
}


def _losses(server, workdir, kind, runs, mesh):
  task, more = KINDS[kind]
  data, fsdp = mesh
  arguments = [
    f'--config=tests/launch/tiny.py:{task}',
    *more,
    f'--workdir={workdir}',
    f'--config.data.batch_size={BATCH}',
    f'--config.evaluation.batch_size={BATCH}',
    f'--config.train.steps={STEPS}',
    f'--config.mesh.data={data}',
    f'--config.mesh.fsdp={fsdp}',
    *(f'--config.model.{field}={WIDTH}' for field in FIELDS[task]),
  ]
  if task != 'tokenizer':
    arguments.append(f'--config.tokenizer={runs / "tokenizer"}')
  count = f'--xla_force_host_platform_device_count={data * fsdp}'
  flags = f'{os.environ["XLA_FLAGS"]} {count}'
  result = server.run('train', *arguments, XLA_FLAGS=flags)
  assert result.code == 0, result.err
  return [
    (name, record[name])
    for record in logs.read(workdir)
    for name in sorted(record)
    if name in ('loss', 'discriminator_loss')
  ]


@pytest.mark.slow
@pytest.mark.parametrize('kind', list(KINDS))
def test_losses_are_those_of_one_device(kind, server, runs, tmp_path):
  one = _losses(server, tmp_path / 'one', kind, runs, (1, 1))
  assert [name for name, _ in one].count('loss') == STEPS
  for mesh in MESHES:
    other = _losses(server, tmp_path / str(mesh), kind, runs, mesh)
    assert [name for name, _ in other] == [name for name, _ in one]
    np.testing.assert_allclose(
      [value for _, value in other],
      [value for _, value in one],
      rtol=TOLERANCE,
      atol=TOLERANCE,
      err_msg=f'{kind} on {mesh}',
    )
