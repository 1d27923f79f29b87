"""Training SiT, or REG, on the global tokens of a frozen tokenizer."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors
from selfboottok_jax.evaluation import cost
from selfboottok_jax.flow import code_scale
from selfboottok_jax.flow import path as path_lib
from selfboottok_jax.flow import times as times_lib
from selfboottok_jax.models import sit, transformer
from selfboottok_jax.objectives import alignment, velocity
from selfboottok_jax.stages import frozen_encoders as encoding_lib
from selfboottok_jax.stages import task
from selfboottok_jax.training import state as state_lib

STATISTICS = ('scalar', 'channel')
# What a fine-tuned generator need not find in the other run: other classes have
# other embeddings, plain SiT no class token, and projectors serve one teacher.
MAY_START_FRESH = (
  *('label_table', 'cls_embed', 'cls_norm', 'to_cls_velocity'),
  *('projector', 'cls_projector'),
)


@dataclasses.dataclass(frozen=True)
class Objective:
  """How the velocity is learnt.

  Attributes:
    path: interpolation between data and noise.
    times: distribution of the training times, a key of `flow.times.TIMES`.
    velocity_cosine: weight of 1 - cosine of the tokens' velocity.
    cls: weight of the class token's velocity loss (REG: 0.03).
    align: weight of the alignment with the teacher (REPA and REG: 0.5).
    align_mode: how tokens are paired with patches, one of
      `encoding.ALIGN_MODES`.
    latent_statistics: mean and deviation over everything ('scalar') or per
      channel ('channel').
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

  def __post_init__(self):
    """Refuses choices that no branch below knows."""
    for name, choices in (
      ('path', tuple(path_lib.PATHS)),
      ('times', tuple(times_lib.TIMES)),
      ('align_mode', encoding_lib.ALIGN_MODES),
      ('latent_statistics', STATISTICS),
    ):
      value = getattr(self, name)
      if value not in choices:
        raise errors.ConfigError(
          f'loss.{name}={value!r}; wanted one of {", ".join(choices)}'
        )
    if self.statistics_images < 0:
      raise errors.ConfigError(
        f'loss.statistics_images={self.statistics_images}; wanted 0 (all) or '
        'more'
      )


class GeneratorTask:
  """Flow matching on normalised codes; tokenizer and teacher are frozen.

  The one trained group is 'generator'. Statistics of the codes lie in
  `stats['latents']`, so that a checkpoint can undo the normalisation. Batches
  hold images, or what a cache kept of them: then nothing frozen computes.
  """

  def __init__(
    self,
    model: sit.SiT,
    objective: Objective,
    encoding: encoding_lib.Encoding,
    *,
    cached: bool = False,
  ):
    """Takes what encodes images, or encoded those of the cache."""
    self.model, self.objective, self.encoding = model, objective, encoding
    self.path = path_lib.PATHS[objective.path]
    self.frozen = {} if cached else encoding.params
    self.groups = ('generator',)
    self.milestones = (0,)
    self.ema_groups = ('generator',)
    self.example = task.image_example(encoding.codec.image_size)
    if cached:
      del self.example['image']
      self.example |= encoding.shapes
    self._check()

  def losses(self, first_step: int) -> dict[str, state_lib.Loss]:
    """The same from the first step to the last."""
    del first_step
    return {'generator': self._loss}

  def init(self, rng: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Fresh parameters; statistics of 0 and 1, until they are measured."""
    model = self.model
    params = model.init(
      rng,
      jnp.zeros((1, model.num_tokens, model.token_dim)),
      jnp.zeros((1,)),
      jnp.zeros((1,), jnp.int32),
      jnp.zeros((1, model.cls_dim)) if model.cls_dim else None,
    )['params']
    one = jnp.ones((model.token_dim,))
    return {'generator': params}, {'latents': {'mean': 0 * one, 'std': one}}

  def components(self, params: Mapping[str, PyTree]) -> list[cost.Component]:
    """The generator's modules, and what of other networks makes its inputs."""
    return [
      *(cost.Component(m, p, True) for m, p in params['generator'].items()),
      *(cost.Component(m, p, False) for m, p in self.frozen.items()),
    ]

  def encode(
    self, frozen: PyTree, batch: Mapping[str, Array]
  ) -> dict[str, Float[Array, 'b ...']]:
    """Codes and what else is learnt, of images or as the cache has them.

    Images are float in [-1, 1]. What an evaluation does not read may be absent
    from a cached batch.
    """
    if 'image' in batch:
      return self.encoding(frozen, batch['image'])
    return {k: batch[k] for k in self.encoding.shapes if k in batch}

  def terms(
    self,
    params: PyTree,
    encoded: Mapping[str, Array],
    labels: Array,
    t: Float[Array, ' b'],
    rng: Any,
    latents: PyTree,
    *,
    train: bool,
  ) -> dict[str, Float[Array, ' b'] | Float[Array, '']]:
    """The terms of the loss, unweighted, at times `t`.

    'velocity' of the tokens and, where they are wanted, 'cosine' and 'cls', of
    each image; and in training 'alignment', of the batch.
    """
    token_key, cls_key, label_key = jax.random.split(rng, 3)
    x = code_scale.normalise(encoded['codes'], latents)
    noise = jax.random.normal(token_key, x.shape)
    cls = cls_noise = noisy_cls = None
    if self.model.cls_dim:
      # The class token has the times of its image and noise of its own.
      cls = encoded['cls']
      cls_noise = jax.random.normal(cls_key, cls.shape)
      noisy_cls = self.path.interpolate(cls, cls_noise, t)
    out = self.model.apply(
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
    if cls is not None:
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
    """The weighted sum of the terms at random times."""
    encoded = self.encode(inputs.frozen, inputs.batch)
    time_key, key = jax.random.split(inputs.rng)
    count = inputs.batch['label'].shape[0]
    t = times_lib.TIMES[self.objective.times](time_key, count, self.path)
    terms = self.terms(
      trained,
      encoded,
      inputs.batch['label'],
      t,
      key,
      inputs.stats['latents'],
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
    loss = sum(weights[name] * term for name, term in terms.items())
    return loss, state_lib.LossOutputs(terms, inputs.stats, inputs.carry)

  def _check(self) -> None:
    """Raises ConfigError for a model that is not of these codes."""
    model = self.model
    if model.align_dim and not 0 < model.align_depth <= model.depth:
      raise errors.ConfigError(
        f'model.align_depth={model.align_depth}; wanted 1 to model.depth='
        f'{model.depth}'
      )
    if self.objective.align_mode == 'cls_only' and not model.cls_dim:
      raise errors.ConfigError(
        'loss.align_mode=cls_only aligns the class token, and there is none; '
        'wanted networks.teacher and loss.cls above 0, or another mode'
      )


def cut_blocks(
  params: Mapping[str, PyTree], model: sit.SiT
) -> dict[str, PyTree]:
  """Parameters whose stacks of blocks are cut where `model` has them cut.

  Where tokens are aligned decides; the blocks are the same.
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
