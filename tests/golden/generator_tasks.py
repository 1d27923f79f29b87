"""The task of a recorded REG, with its noise and times in place of random."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.objectives import alignment
from selfboottok_jax.pretrained import contract
from selfboottok_jax.stages import frozen_encoders, generator
from selfboottok_jax.training import state as state_lib
from tests.golden import networks

_entangled_loss = alignment.entangled_loss


@dataclasses.dataclass(frozen=True)
class _Shapes:
  """A teacher of which nothing but shapes is asked."""

  patches: int
  dim: int
  name: str = 'recorded'
  params: Any = None

  def __call__(self, params, images):
    count = len(images)
    return contract.Features(
      jnp.zeros((count, self.patches, self.dim)), jnp.zeros((count, self.dim))
    )

  def grid(self, image_size):
    side = round(self.patches**0.5)
    return side, side


def make_task(network: networks.Network, meta: dict[str, Any]):
  """The task that trains such a network, from what a cache would hold."""
  model = network.model
  encoder = contract.ImageEncoder(
    lambda params, images: jnp.zeros(
      (len(images), model.num_tokens, model.token_dim)
    ),
    params={},
    num_tokens=model.num_tokens,
    token_dim=model.token_dim,
    image_size=1,
    positions=model.positions,
  )
  teacher = _Shapes(model.num_tokens, model.align_dim)
  goal = generator.Objective(
    path=meta['model_args']['path_type'],
    cls=meta['beta_cls'],
    align=meta['proj_coeff'],
  )
  encoder = frozen_encoders.FrozenEncoders(
    encoder, teacher, True, goal.align_mode
  )
  return generator.GeneratorTask(model, goal, encoder, cached=True)


def batch(network: networks.Network, arrays: dict[str, np.ndarray]):
  """Returns the cache entries of their data, and their random draws."""
  # Row 0 is that of the class token.
  targets = jnp.asarray(arrays['in.target_z'])
  count = network.model.num_tokens
  return {
    'codes': network.tokens(arrays['in.data']),
    'cls': jnp.asarray(arrays['in.data_cls']),
    'targets': alignment.make_targets(targets[:, 1:], count),
    'label': networks.integers(arrays['in.y']),
    'drawn': {
      'noise': network.tokens(arrays['in.noise']),
      'noise_cls': jnp.asarray(arrays['in.noise_cls']),
      't': jnp.asarray(arrays['in.t_loss']).reshape(-1),
      'cls_target': targets[:, 0],
    },
  }


def latents(network: networks.Network) -> dict[str, Any]:
  """Statistics of codes that are normalised already."""
  width = network.model.token_dim
  return {'mean': jnp.zeros(width), 'std': jnp.ones(width)}


def inject(monkeypatch) -> dict[str, Any]:
  """Puts what was drawn there where it is drawn here.

  Returns the dict in which it has to be before the loss is called.
  """
  drawn = {}

  def normal(key, shape):
    (found,) = [
      drawn[name]
      for name in ('noise', 'noise_cls')
      if drawn[name].shape == shape
    ]
    return found

  def entangled(targets, tokens, cls_target, cls_token):
    # One record aligns the class token with another vector than it denoises.
    del cls_target
    return _entangled_loss(targets, tokens, drawn['cls_target'], cls_token)

  monkeypatch.setattr(jax.random, 'normal', normal)
  monkeypatch.setattr(alignment, 'entangled_loss', entangled)
  monkeypatch.setitem(path_lib.TIMES, 'uniform', lambda *_: drawn['t'])
  return drawn


def loss_of_weights(network: networks.Network, task, drawn: dict[str, Any]):
  """The task's loss of arrays under the names of the file."""
  (loss,) = task.losses(0).values()

  def of_weights(weights, inputs):
    drawn.update(inputs.batch['drawn'])
    return loss(network.params(weights), inputs)

  return of_weights


def inputs(network: networks.Network, arrays) -> state_lib.LossInputs:
  """Inputs of the task's loss, from the recorded arrays."""
  return state_lib.LossInputs(
    params={},
    frozen={},
    batch=batch(network, arrays),
    stats={'latents': latents(network)},
    carry={},
    step=jnp.zeros((), jnp.int32),
    rng=jax.random.key(0),
  )
