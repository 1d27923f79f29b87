"""The loss of the generator: SiT, or REG, on codes of a frozen tokenizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors, stages
from selfboottok_jax.evaluation import cost
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.inference.generator import CODE_STATISTICS, GROUP
from selfboottok_jax.models import sit, transformer
from selfboottok_jax.objectives import alignment, velocity
from selfboottok_jax.stages import frozen_encoders
from selfboottok_jax.training import state as state_lib

STATISTICS = ('scalar', 'channel')
# Modules that a fine-tuned generator need not find in the other run: other
# classes have other embeddings, plain SiT has no class token, and projectors
# serve one teacher.
MAY_START_FRESH = (
  *('label_table', 'cls_embed', 'cls_norm', 'to_cls_velocity'),
  *('projector', 'cls_projector'),
)


@dataclasses.dataclass(frozen=True)
class Objective:
  """Weights and switches of the generator's loss.

  Attributes:
    path: interpolation between data and noise, a key of `flow.path.PATHS`.
    times: distribution of the training times, a key of `flow.path.TIMES`.
    velocity_cosine: weight of 1 - cosine of the tokens' velocity.
    cls: weight of the class token's velocity loss (REG: 0.03).
    align: weight of the alignment with the teacher (REPA and REG: 0.5).
    align_mode: pairing of tokens with patches, one of
      `frozen_encoders.ALIGN_MODES`.
    latent_statistics: normalise codes by one mean and deviation ('scalar') or
      by those of each channel ('channel').
    statistics_images: images over which they are measured; 0 is all.
  """

  path: str = 'linear'
  times: str = 'uniform'
  velocity_cosine: float = 0.0
  cls: float = 0.03
  align: float = 0.5
  align_mode: str = 'repeat'
  latent_statistics: str = 'scalar'
  statistics_images: int = 10_000

  def __post_init__(self) -> None:
    """Raises ConfigError for values that no training can use."""
    for name, choices in (
      ('path', path_lib.PATHS),
      ('times', path_lib.TIMES),
      ('align_mode', frozen_encoders.ALIGN_MODES),
      ('latent_statistics', STATISTICS),
    ):
      errors.require_choice(f'loss.{name}', getattr(self, name), choices)
    for name in ('velocity_cosine', 'cls', 'align', 'statistics_images'):
      value = getattr(self, name)
      errors.require(value >= 0, f'loss.{name}', value, '0 or more')


class GeneratorTask:
  """Flow matching on normalised codes; tokenizer and teacher are frozen.

  The one trained group is 'generator'. Mean and deviation of the codes lie in
  `stats['latents']`, so that a checkpoint can undo the normalisation. Batches
  hold images, or the outputs of the frozen encoders as a token cache keeps
  them: then nothing frozen computes.
  """

  def __init__(
    self,
    model: sit.SiT,
    objective: Objective,
    encoders: frozen_encoders.FrozenEncoders,
    *,
    cached: bool = False,
  ):
    """Takes the network, its loss and what encodes images.

    Args:
      model: the generator; its widths fit the encoders' outputs.
      objective: weights of the loss.
      encoders: the frozen networks.
      cached: batches hold the encoders' outputs in place of images.

    Raises:
      ConfigError: an alignment that the model cannot compute.
    """
    self.model, self.objective, self.encoders = model, objective, encoders
    self.path = path_lib.PATHS[objective.path]
    self.frozen = {} if cached else encoders.params
    self.groups: tuple[str, ...] = (GROUP,)
    self.ema_groups: tuple[str, ...] = (GROUP,)
    self.milestones: tuple[int, ...] = (0,)
    self.example = stages.image_example(encoders.tokenizer.image_size)
    if cached:
      del self.example['image']
      self.example |= encoders.shapes
    model.check()
    if objective.align_mode == 'cls_only' and not model.cls_dim:
      raise errors.ConfigError(
        'loss.align_mode=cls_only aligns the class token, and there is none; '
        'wanted networks.teacher and loss.cls above 0, or another mode'
      )

  def losses(self, first_step: int) -> dict[str, state_lib.Loss]:
    """The one loss, the same from the first step to the last."""
    del first_step
    return {GROUP: self._loss}

  def init(self, rng: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Fresh parameters; code statistics of 0 and 1 until they are measured."""
    model = self.model
    params = model.init(
      rng,
      jnp.zeros((1, model.num_tokens, model.token_dim)),
      jnp.zeros((1,)),
      jnp.zeros((1,), jnp.int32),
      jnp.zeros((1, model.cls_dim)) if model.cls_dim else None,
    )['params']
    one = jnp.ones((model.token_dim,))
    return {GROUP: params}, {CODE_STATISTICS: {'mean': 0 * one, 'std': one}}

  def components(self, params: Mapping[str, PyTree]) -> list[cost.Component]:
    """The generator's modules, and the frozen networks that run beside it."""
    return [
      *(cost.Component(m, p, True) for m, p in params[GROUP].items()),
      *(cost.Component(m, p, False) for m, p in self.frozen.items()),
    ]

  def encode(
    self, frozen: PyTree, batch: Mapping[str, Array]
  ) -> dict[str, Float[Array, 'b ...']]:
    """The encoders' outputs for a batch of images, or those of a cached batch.

    See `stages.normalise` for the images. A cached batch may lack what its
    reader does not use.
    """
    if 'image' in batch:
      return self.encoders(frozen, stages.normalise(batch)['image'])
    return {k: batch[k] for k in self.encoders.shapes if k in batch}

  def terms(
    self,
    params: PyTree,
    encoded: Mapping[str, Array],
    labels: Array,
    t: Float[Array, ' b'],
    rng: Any,
    statistics: PyTree,
    *,
    train: bool,
  ) -> dict[str, Float[Array, ' b'] | Float[Array, '']]:
    """The terms of the loss, unweighted, at times `t`.

    Args:
      params: of the generator.
      encoded: what `encode` returns.
      labels: classes.
      t: time of each image, 0 is data and 1 is noise.
      rng: key of the noise and of the dropped labels.
      statistics: 'mean' and 'std' of the codes.
      train: drop labels, and compute the alignment.

    Returns:
      'velocity' of the tokens [b] and, where the objective has them, 'cosine'
      [b] and 'cls' [b]; in training also 'alignment', a mean over the batch.
    """
    token_key, cls_key, label_key = jax.random.split(rng, 3)
    # The path's noise has unit deviation, so the codes get it too.
    x = path_lib.normalise_codes(encoded['codes'], statistics)
    noise = jax.random.normal(token_key, x.shape)
    cls = cls_noise = noisy_cls = None
    if self.model.cls_dim:
      # REG: the class token shares its image's time, with noise of its own.
      cls = encoded['cls']
      cls_noise = jax.random.normal(cls_key, cls.shape)
      noisy_cls = self.path.interpolate(cls, cls_noise, t)
    out: Any = self.model.apply(
      {'params': params},
      self.path.interpolate(x, noise, t),
      t,
      labels,
      noisy_cls,
      train=train,
      rngs={'dropout': label_key} if train else None,
    )
    args = x, noise, t, self.path
    terms = {'velocity': velocity.velocity_loss(out.tokens, *args)}
    if self.objective.velocity_cosine:
      terms['cosine'] = velocity.velocity_cosine(out.tokens, *args)
    if cls is not None and cls_noise is not None:
      terms['cls'] = velocity.velocity_loss(
        out.cls, cls, cls_noise, t, self.path
      )
    if out.aligned is not None or out.aligned_cls is not None:
      terms['alignment'] = alignment.entangled_loss(
        encoded.get('targets'), out.aligned, cls, out.aligned_cls
      )
    return terms

  def _loss(
    self, trained: PyTree, inputs: state_lib.LossInputs
  ) -> tuple[Float[Array, ''], state_lib.LossOutputs]:
    """The weighted sum of the terms, at one random time for each image."""
    encoded = self.encode(inputs.frozen, inputs.batch)
    time_key, key = jax.random.split(inputs.rng)
    count = inputs.batch['label'].shape[0]
    t = path_lib.TIMES[self.objective.times](time_key, count, self.path)
    terms = self.terms(
      trained,
      encoded,
      inputs.batch['label'],
      t,
      key,
      inputs.stats[CODE_STATISTICS],
      train=True,
    )
    terms = {name: jnp.mean(term) for name, term in terms.items()}
    o = self.objective
    weights = {
      'velocity': 1.0,
      'cosine': o.velocity_cosine,
      'cls': o.cls,
      'alignment': o.align,
    }
    loss = sum(
      (weights[name] * term for name, term in terms.items()), jnp.zeros(())
    )
    metrics = {f'loss/{name}': term for name, term in terms.items()}
    return loss, state_lib.LossOutputs(metrics, inputs.stats, inputs.carry)


def cut_blocks(
  params: Mapping[str, PyTree], model: sit.SiT
) -> dict[str, PyTree]:
  """Regroups the stacked blocks of another run as `model` groups them.

  A stack ends where tokens are aligned, so runs with another `align_depth`
  hold the same blocks in stacks of other lengths.
  """
  stacks = {
    name: stack for name, stack in params.items() if name.startswith('blocks_')
  }
  in_order = sorted(stacks, key=lambda name: int(name.removeprefix('blocks_')))
  whole = jax.tree.map(
    lambda *parts: np.concatenate(parts), *(stacks[name] for name in in_order)
  )
  kept = {name: p for name, p in params.items() if name not in stacks}
  for begin, end in model.segments:
    kept[transformer.segment_name(begin)] = jax.tree.map(
      lambda leaf, rows=slice(begin, end): leaf[rows], whole
    )
  return kept
