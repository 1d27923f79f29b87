"""Trains on a data set of TFDS, where TensorFlow cannot be imported."""

import os

import numpy as np
import pytest

from selfboottok_jax.training import checkpointing
from tests.data import forms
from tests.launch import commands, logs

TINY = '--config=tests/launch/tiny.py:'
DATA = ('--config.data.source=auto', '--config.data.path=tfds:flowers')


@pytest.mark.slow
@pytest.mark.long
def test_all_three_stages_train_without_tensorflow(tmp_path):
  forms.write_tfds(tmp_path / 'tfds')
  # It is found as TensorFlow would be, and ends the process that imports it.
  stand_in = tmp_path / 'stand_in' / 'tensorflow'
  stand_in.mkdir(parents=True)
  (stand_in / '__init__.py').write_text('import os\nos._exit(3)\n')
  environment = {
    'TFDS_DATA_DIR': str(tmp_path / 'tfds'),
    'XDG_CACHE_HOME': str(tmp_path / 'cache'),
    'PYTHONPATH': f'{stand_in.parent}{os.pathsep}{commands.ROOT}',
  }
  tokenizer = f'--config.tokenizer={tmp_path / "tokenizer"}'
  for task, more in (
    ('tokenizer', ()),
    ('scaling', (tokenizer,)),
    ('generator', (tokenizer, '--config.evaluation.num_samples=4')),
  ):
    workdir = tmp_path / task
    process = commands.spawn(
      *('train', f'{TINY}{task}', f'--workdir={workdir}', *DATA, *more),
      **environment,
    )
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)
    assert '45 train, 15 val images, 3 classes' in out + err
    losses = [r['loss'] for r in logs.read(workdir) if 'loss' in r]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
  config = checkpointing.read_config(str(tmp_path / 'generator'), 'test')
  assert config['data']['path'] == 'tfds:flowers'
