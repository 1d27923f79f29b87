"""The same losses on any mesh."""

import os

import jax
import numpy as np
import pytest

from selfboottok_jax import placement, pretrained
from selfboottok_jax.evaluation import cost
from selfboottok_jax.training import sharding
from tests.launch import logs

MESHES = [(8, 1), (2, 4), (1, 8)]
BATCH, STEPS, TOLERANCE = 16, 5, 1e-5
# Wide enough that the shape rule shards kernels.
WIDTH = 128
assert WIDTH * WIDTH >= placement.MIN_SIZE
FIELDS = {
  'tokenizer': ('encoder_width', 'decoder_width'),
  'scaling': ('local2d_width',),
  'generator': ('width',),
}
TEACHERS = {
  'repa_global': 'dinov2_tiny:random',
  'repa_local': 'ijepa_tiny:random',
  'transport': 'vavae_tiny:random',
}
KINDS = {
  **{task: (task, ()) for task in FIELDS},
  # A batch norm that saw a device's share alone would tell another loss.
  'dino': ('tokenizer', ('--config.discriminator.kind=dino',)),
  # Without adversary: compiling takes long enough.
  'teachers': (
    'tokenizer',
    (
      '--config.loss.adversarial=0.0',
      *(f'--config.networks.{k}={v}' for k, v in TEACHERS.items()),
    ),
  ),
}


def _losses(server, workdir, kind, stage1, mesh):
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
  if stage1:
    arguments.append(f'--config.tokenizer={stage1}')
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
@pytest.mark.parametrize(
  'kind',
  [
    pytest.param(
      kind,
      # Two minutes and more; the others have their parts but the networks.
      marks=() if kind == 'generator' else pytest.mark.long,
    )
    for kind in KINDS
  ],
)
def test_losses_are_those_of_one_device(kind, server, request, tmp_path):
  stage1 = None
  if KINDS[kind][0] != 'tokenizer':
    stage1 = request.getfixturevalue('runs') / 'tokenizer'
  one = _losses(server, tmp_path / 'one', kind, stage1, (1, 1))
  assert [name for name, _ in one].count('loss') == STEPS
  for mesh in MESHES:
    other = _losses(server, tmp_path / str(mesh), kind, stage1, mesh)
    assert [name for name, _ in other] == [name for name, _ in one]
    np.testing.assert_allclose(
      [value for _, value in other],
      [value for _, value in one],
      rtol=TOLERANCE,
      atol=TOLERANCE,
      err_msg=f'{kind} on {mesh}',
    )
    if kind == 'teachers':
      _check_frozen(tmp_path / 'one', tmp_path / str(mesh), mesh[1])


def _check_frozen(one, other, fsdp):
  """Memory of the programs: a device holds its share of large leaves."""
  whole, share = (cost.read(path).memory.frozen for path in (one, other))
  split = 0
  for name, spec in TEACHERS.items():
    params = pretrained.load_network(spec, abstract=True, grid=2).params
    specs = sharding.tree_specs(params, {'data': 1, 'fsdp': fsdp})
    large = [
      leaf.size
      for leaf, split in zip(
        jax.tree.leaves(params), jax.tree.leaves(specs), strict=True
      )
      if any(split)
    ]
    # The tiny autoencoder is of small leaves alone.
    assert bool(large) == (name != 'transport')
    split += sum(large)
  assert whole - share == 4 * split * (fsdp - 1) / fsdp
