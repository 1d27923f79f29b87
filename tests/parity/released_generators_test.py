"""Checkpoints of torch as SiT's and REG's trainings save them."""

import argparse

import numpy as np
import pytest
import torch

from selfboottok_jax.models import sit
from selfboottok_jax.pretrained import released_generators
from selfboottok_jax.training import checkpointing
from tests import tiny
from tests.inference import released_sits


def _tensors(arrays):
  return {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}


def _checkpoint(family, averaged):
  """Averaged parameters beside others, the optimiser's and settings."""
  other = _tensors(released_sits.state_dict(family, seed=1))
  weight = torch.nn.Parameter(torch.ones(3))
  optimizer = torch.optim.AdamW([weight])
  weight.sum().backward()
  optimizer.step()
  return {
    'model': other,
    'ema': _tensors(averaged),
    'opt': optimizer.state_dict(),
    'args': argparse.Namespace(exp_name='x', enc_type='dinov2-vit-b', cls=0.03),
    'steps': 4_000_000,
  }


@pytest.mark.parametrize(
  ('family', 'name', 'whole'),
  [('sit', 'sit_xl2', False), ('reg', 'reg_xl2', True)],
)
def test_is_imported_from_a_file_of_torch(
  server, tmp_path, family, name, whole
):
  arrays = released_sits.state_dict(family, learn_sigma=family == 'sit')
  value = _checkpoint(family, arrays) if whole else _tensors(arrays)
  path, workdir = tmp_path / f'{family}.pt', tmp_path / 'run'
  torch.save(value, path)
  result = server.run(
    'import_generator',
    f'--network={name}:{path}',
    f'--workdir={workdir}',
    '--tokenizer=vavae_tiny:random',
    f'--heads={released_sits.HEADS}',
  )
  assert result.code == 0, result.err
  fields = released_generators.fields(
    arrays, family, 'test', heads=released_sits.HEADS
  )
  model = sit.SiT(**fields, align_depth=released_sits.DEPTH)
  wanted = released_generators.read(arrays, model, family, 'test')
  run = checkpointing.read_run(str(workdir), what='test', task='generator')
  tiny.assert_same(run.ema['generator'], wanted)
  np.testing.assert_array_equal(run.stats['latents']['std'], 1)
