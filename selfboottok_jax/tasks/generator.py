"""Training SiT on the global tokens of a frozen tokenizer."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors, tasks
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.models import sit
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.objectives import velocity
from selfboottok_jax.training import state as state_lib

STATISTICS = ('scalar', 'channel')


@dataclasses.dataclass(frozen=True)
class Objective:
  """How the velocity is learnt.

  Attributes:
    path: interpolation between data and noise.
    latent_statistics: mean and deviation over everything ('scalar') or per
      channel ('channel').
    statistics_images: images over which they are measured.
  """

  path: str = 'linear'
  latent_statistics: str = 'scalar'
  statistics_images: int = 10_000

  def __post_init__(self):
    """Refuses choices that no branch below knows."""
    for name, choices in (
      ('path', tuple(path_lib.PATHS)),
      ('latent_statistics', STATISTICS),
    ):
      value = getattr(self, name)
      if value not in choices:
        raise errors.ConfigError(
          f'loss.{name}={value!r}; wanted one of {", ".join(choices)}'
        )
    if self.statistics_images < 1:
      raise errors.ConfigError(
        f'loss.statistics_images={self.statistics_images}; wanted 1 or more'
      )


class GeneratorTask:
  """Flow matching on normalised codes; the tokenizer is a frozen network.

  The one trained group is 'generator'. Statistics of the codes lie in
  `stats['latents']`, so that a checkpoint can undo the normalisation.
  """

  def __init__(
    self,
    model: sit.SiT,
    objective: Objective,
    tokenizer: tokenizer_lib.Tokenizer,
    tokenizer_params: PyTree,
  ):
    """Takes the tokenizer's module and its served parameters."""
    self.model, self.objective, self.tokenizer = model, objective, tokenizer
    self.path = path_lib.PATHS[objective.path]
    self.frozen = {'tokenizer': encoding_params(tokenizer_params)}
    self.groups = ('generator',)
    self.milestones = (0,)
    self.ema_groups = ('generator',)

  def losses(self, first_step: int) -> dict[str, state_lib.Loss]:
    """The same from the first step to the last."""
    del first_step
    return {'generator': self._loss}

  def init(self, rng: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Fresh parameters; statistics of 0 and 1, until they are measured."""
    tokens = jnp.zeros((1, self.model.num_tokens, self.model.token_dim))
    params = self.model.init(
      rng, tokens, jnp.zeros((1,)), jnp.zeros((1,), jnp.int32)
    )['params']
    one = jnp.ones((self.model.token_dim,))
    return {'generator': params}, {'latents': {'mean': 0 * one, 'std': one}}

  def components(self, params: Mapping[str, PyTree]) -> list[tasks.Component]:
    """The generator's modules, and what of the tokenizer makes its codes."""
    return [
      *(tasks.Component(m, p, True) for m, p in params['generator'].items()),
      tasks.Component('tokenizer', self.frozen['tokenizer'], False),
    ]

  def _loss(
    self, trained: PyTree, inputs: state_lib.LossInputs
  ) -> tuple[Float[Array, ''], state_lib.LossOutputs]:
    """Mean squared velocity error at uniform t."""
    with jax.named_scope('tokenizer'):
      codes = self.tokenizer.apply(
        {'params': inputs.frozen['tokenizer']},
        inputs.batch['image'],
        method='encode',
      )
    x = normalise(codes, inputs.stats['latents'])
    time_key, noise_key, label_key = jax.random.split(inputs.rng, 3)
    t = jax.random.uniform(time_key, x.shape[:1], minval=self.path.min_time)
    noise = jax.random.normal(noise_key, x.shape)
    prediction = self.model.apply(
      {'params': trained},
      self.path.interpolate(x, noise, t),
      t,
      inputs.batch['label'],
      train=True,
      rngs={'dropout': label_key},
    )
    loss = jnp.mean(velocity.velocity_loss(prediction, x, noise, t, self.path))
    return loss, state_lib.LossOutputs({}, inputs.stats, inputs.carry)


def encoding_params(params: PyTree) -> dict[str, PyTree]:
  """The modules that `encode` reads."""
  return {k: params[k] for k in ('encoder', 'quantizer_global')}


def normalise(
  codes: Float[Array, 'b k e'], latents: PyTree
) -> Float[Array, 'b k e']:
  """Codes to what the generator models: mean 0 and deviation 1."""
  return (codes - latents['mean'][None, None]) / latents['std'][None, None]


def denormalise(
  x: Float[Array, 'b k e'], latents: PyTree
) -> Float[Array, 'b k e']:
  """Inverse of `normalise`."""
  return x * latents['std'][None, None] + latents['mean'][None, None]


def measure_latents(
  codes: Iterable[Float[np.ndarray, 'b k e']], kind: str
) -> dict[str, Float[np.ndarray, ' e']]:
  """Mean and deviation of batches of codes, per channel or over all."""
  count, total, square = 0, 0.0, 0.0
  for batch in codes:
    wide = np.asarray(batch, np.float64)
    count += wide.shape[0] * wide.shape[1]
    total = total + wide.sum(axis=(0, 1))
    square = square + np.square(wide).sum(axis=(0, 1))
  mean, power = total / count, square / count
  if kind == 'scalar':
    mean, power = (np.full_like(a, a.mean()) for a in (mean, power))
  std = np.sqrt(np.maximum(power - mean**2, 1e-12))
  return {'mean': mean.astype(np.float32), 'std': std.astype(np.float32)}
