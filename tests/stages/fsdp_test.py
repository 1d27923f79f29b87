"""What devices exchange in the steps of the three trainings."""

import numpy as np
import pytest

from selfboottok_jax import placement
from selfboottok_jax.stages import dry_run, programs
from selfboottok_jax.training import sharding
from tests import hlo
from tests.launch import tiny

# Wide enough that weights are split.
CHANGES = {
  'tokenizer': {
    'model.encoder_width': 128,
    'model.decoder_width': 128,
    'model.quantizer_chunk': 1,
    'data.image_size': 32,
    'discriminator.kind': 'dino',
    'networks.perceptual': 'lpips_squeeze:random',
    'networks.repa_global': 'dinov2_tiny:random',
    'networks.repa_local': 'ijepa_tiny:random',
    'networks.transport': 'vavae_tiny:random',
  },
  'scaling': {'model.local2d_width': 128, 'assumed.tokenizer': 'quickstart'},
  'generator': {'model.width': 128, 'assumed.tokenizer': 'quickstart'},
}


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [(1, 8), (2, 4)])
@pytest.mark.parametrize(
  'task',
  [
    'generator',
    *(
      pytest.param(t, marks=pytest.mark.long) for t in ('tokenizer', 'scaling')
    ),
  ],
)
def test_weights_travel_and_activations_do_not(task, mesh):
  config = tiny.get_config(task)
  config.update_from_flattened_dict(CHANGES[task])
  config.data.batch_size = 16
  made = dry_run.abstract_task(config).task
  step_fn = programs.TrainPrograms(config, made, sharding.make_mesh(*mesh))
  compiled = step_fn.compile(max(made.milestones))
  found = hlo.collectives(compiled.as_text())
  weights = hlo.shared_weights((step_fn.state.params, step_fn.frozen))
  assert weights
  # Labels too, but they are integers.
  gathered = {
    c.shape for c in found if c.kind == 'all-gather' and c.dtype == 'f32'
  }
  assert gathered
  assert gathered <= weights | hlo.updated_shares(step_fn.state)
  # What is added up whole are means over the batch, and small gradients.
  added = {c.shape for c in found if c.kind == 'all-reduce'}
  assert not added & weights
  large = {c.kind for c in found if np.prod(c.shape) >= placement.MIN_SIZE}
  assert large <= {'all-gather', 'all-reduce', 'reduce-scatter'}
