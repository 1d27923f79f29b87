"""Training the tokenizer, whole (stage 1) or in part (stage 2), on Eq. (4)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from selfboottok_jax.evaluation import cost
from selfboottok_jax.models import (
  aligners,
  layers,
  quantizers,
  tokenizer_params,
)
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.objectives import (
  adversarial,
  alignment,
  entropy,
  perceptual,
  pixel,
  transport,
)
from selfboottok_jax.stages import critic as critic_lib
from selfboottok_jax.stages import objective as objective_lib
from selfboottok_jax.stages import task
from selfboottok_jax.training import state as state_lib


class TokenizerTask:
  """Eq. (4) for a tokenizer, against frozen networks and a critic.

  Parameter groups: 'tokenizer' (trained, with the heads to the teachers),
  'base' (parts of the tokenizer that stay as they are; absent in stage 1),
  'discriminator'. `networks` is keyed by term: perceptual, repa_global,
  repa_local, transport; a term whose group the model lacks is left out.
  """

  def __init__(
    self,
    model: tokenizer_lib.Tokenizer,
    objective: objective_lib.Objective,
    networks: Mapping[str, Any],
    critic: critic_lib.Critic | None,
    *,
    steps: int,
    trainable: tuple[str, ...] | None = None,
  ):
    """Fixes what is computed.

    `steps` scales warm-ups and starts; `trainable`: the modules that learn,
    None for all.
    """
    self.model, self.objective, self.critic = model, objective, critic
    self.networks = {
      term: network
      for term, network in networks.items()
      if term in objective_lib.active_terms(model, objective, trainable)
    }
    # By term the first one of the same network: it is one argument of the step
    # however many terms it serves.
    self._owner = {
      term: next(t for t, n in self.networks.items() if n is network)
      for term, network in self.networks.items()
    }
    self.frozen = {t: self.networks[t].params for t in self._owner.values()}
    self.warmup_steps = round(objective.perceptual_warmup * steps)
    self.start_step = round(objective.adversarial_start * steps)
    self.groups = ('tokenizer',)
    self.milestones = (0,)
    if critic is not None:
      self.groups += ('discriminator',)
      self.frozen |= critic.frozen
      starts = sorted({0, self.start_step})
      # A critic that would start at the end never does.
      self.milestones = tuple(m for m in starts if m < max(steps, 1))
    self.ema_groups = ('tokenizer',)
    self.example = task.image_example(model.image_size)
    self._projectors = {
      tokenizer_params.PROJECTOR + term: aligners.Projector(
        self.networks[term].dim, objective.projector_width, model.dtype
      )
      for term in ('repa_global', 'repa_local')
      if term in self.networks
    }
    if (
      'transport' in self.networks
      and self.networks['transport'].dim != model.token_dim
    ):
      # On the tokens' side: were the latents' side trained, zero would win.
      self._projectors[tokenizer_params.PROJECTOR + 'transport'] = (
        aligners.Projector(
          self.networks['transport'].dim, objective.projector_width, model.dtype
        )
      )

  def losses(self, first_step: int) -> dict[str, state_lib.Loss]:
    """Of the phase from `first_step` on: with the critic, or before it."""
    active = self.critic is not None and first_step >= self.start_step
    losses = {'tokenizer': functools.partial(self._tokenizer_loss, active)}
    if active:
      losses['discriminator'] = self.critic.loss
    return losses

  def init(self, rng: Any) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Fresh parameters of both groups, and the critic's statistics."""
    model_key, head_key, critic_key = jax.random.split(rng, 3)
    image = jnp.zeros((1, self.model.image_size, self.model.image_size, 3))
    group = dict(self.model.init(model_key, image)['params'])
    tokens = jnp.zeros((1, self.model.num_tokens, self.model.token_dim))
    for index, (name, head) in enumerate(self._projectors.items()):
      key = jax.random.fold_in(head_key, index)
      group[name] = head.init(key, tokens)['params']
    params, stats = {'tokenizer': group}, {}
    if self.critic is not None:
      params['discriminator'], stats = self.critic.init(critic_key, image)
    return params, stats

  def components(self, params: Mapping[str, PyTree]) -> list[cost.Component]:
    """The tokenizer's modules, the heads, the critic, the frozen networks."""
    found = [
      cost.Component(module, of_module, group == 'tokenizer')
      for group in ('tokenizer', 'base')
      for module, of_module in params.get(group, {}).items()
    ]
    if self.critic is not None:
      found.append(
        cost.Component('discriminator', params['discriminator'], True)
      )
    return found + [
      cost.Component(name, params, False)
      for name, params in self.frozen.items()
    ]

  def _tokenizer_loss(
    self, critic_active: bool, trained: PyTree, inputs: state_lib.LossInputs
  ) -> tuple[Float[Array, ''], state_lib.LossOutputs]:
    """Eq. (4)."""
    o = self.objective
    params = inputs.params.get('base', {}) | trained
    output, variables = self.model.apply(
      {'params': tokenizer_params.model_params(params)},
      inputs.batch['image'],
      train=True,
      rngs={'groups': inputs.rng},
      mutable=['intermediates'],
    )
    losses = self._losses_of_pixels(critic_active, inputs)
    if critic_active and o.adaptive_weight:
      (features,) = variables['intermediates']['decoder']['features']
      terms, stats = self._balance(losses, output.reconstruction, features)
    else:
      terms, stats = {}, inputs.stats
      for name, (weight, loss) in losses.items():
        value, stats = loss(output.reconstruction)
        terms[name] = weight, value
    align_terms, diagnostics = self._align(params, inputs, output)
    terms |= align_terms
    if o.kl:
      terms['kl'] = o.kl, self._kl(output)
    total = sum(weight * value for weight, value in terms.values())
    metrics = {name: value for name, (_, value) in terms.items()}
    if critic_active and o.adaptive_weight:
      metrics['adversarial_weight'] = terms['adversarial'][0]
    return total, state_lib.LossOutputs(
      metrics=metrics | diagnostics | _fusion_weights(params),
      stats=stats,
      carry={'reconstruction': jax.lax.stop_gradient(output.reconstruction)},
    )

  def _losses_of_pixels(self, critic_active, inputs):
    """The terms that see the reconstruction alone, the critic's last.

    By name (weight, reconstruction -> (value, statistics)).
    """
    o, images, stats = self.objective, inputs.batch['image'], inputs.stats
    losses = {}
    if o.pixel:
      losses['pixel'] = (
        o.pixel,
        lambda x: (pixel.pixel_loss(images, x, kind=o.pixel_kind), stats),
      )
    if 'perceptual' in self.networks:
      losses['perceptual'] = (
        o.perceptual,
        lambda x: (self._perceptual(inputs, x), stats),
      )
    if critic_active:
      # Group dropout draws from the key itself.
      key = jax.random.fold_in(inputs.rng, 1)
      losses['adversarial'] = (
        o.adversarial,
        lambda x: self.critic.generator_loss(x, inputs, key),
      )
    return losses

  def _balance(self, losses, reconstruction, features):
    """Terms with the adaptive weight: lambda_2 in the proportion of pulls."""
    terms, gradients = {}, {}
    for name, (weight, loss) in losses.items():
      value, stats, gradient = adversarial.pull(loss, reconstruction)
      terms[name] = weight, value
      gradients[name] = layers.patchify(gradient, self.model.patch_size)
    away = gradients.pop('adversarial')
    towards = sum(
      (terms[name][0] * gradient for name, gradient in gradients.items()),
      jnp.zeros_like(away),
    )
    ratio = adversarial.adaptive_weight(features, towards, away)
    weight, value = terms['adversarial']
    return terms | {'adversarial': (weight * ratio, value)}, stats

  def _perceptual(self, inputs, reconstruction):
    """The gated distance; the raw one would hide the warm-up in the log."""
    with jax.named_scope('perceptual'):
      weighted, _ = perceptual.perceptual_loss(
        self.networks['perceptual'],
        inputs.frozen[self._owner['perceptual']],
        inputs.batch['image'],
        reconstruction,
        step=inputs.step,
        warmup_steps=self.warmup_steps,
      )
    return weighted

  def _align(self, params, inputs, output):
    """Eq. (5): the weighted terms, and what tells whether they are healthy."""
    o = self.objective
    group_of = {'repa_global': 'global', 'repa_local': o.repa_local_on}
    terms, diagnostics = {}, {}
    see = functools.cache(functools.partial(self._features, inputs))
    for term, group in group_of.items():
      if term not in self.networks:
        continue
      features = see(self._owner[term])
      if o.repa_input == 'continuous':
        tokens = output.latents[group]
      else:
        tokens = output.quantized[group].codes
      if o.repa_mode == 'global':
        # The reference projects the mean token, not the tokens.
        tokens = jnp.mean(tokens, axis=1, keepdims=True)
      projected = self._project(params, term, tokens)
      terms[term] = (
        o.align * getattr(o, term),
        alignment.alignment_loss(features.patches, projected, mode=o.repa_mode),
      )
    if 'transport' in self.networks:
      features = see(self._owner['transport'])
      tokens = self._project(params, 'transport', output.latents['local2d'])
      result = transport.transport_loss(
        features.patches,
        tokens,
        ot_loss=o.ot_loss,
        relative_epsilon=o.ot_epsilon,
        num_iterations=o.ot_iterations,
      )
      terms['transport'] = o.align * o.transport, result.loss
      diagnostics['transport_spread'] = result.spread
      diagnostics['transport_marginal_error'] = result.marginal_error
    return terms, diagnostics

  def _project(self, params, term, tokens):
    name = tokenizer_params.PROJECTOR + term
    if name not in self._projectors:
      return tokens
    with jax.named_scope(name):
      return self._projectors[name].apply({'params': params[name]}, tokens)

  def _features(self, inputs, term):
    """What a teacher sees in the images."""
    with jax.named_scope(term):
      return self.networks[term](inputs.frozen[term], inputs.batch['image'])

  def _kl(self, output):
    """Mean over groups: a model's weight on its codebooks' use is one."""
    o, chunk = self.objective, self.model.quantizer_chunk
    options = {'temperature': o.kl_temperature, 'pool': o.kl_pool}
    values = []
    for quantized in output.quantized.values():
      if chunk:
        sample, average = entropy.chunked_assignment_entropy(
          quantized.logits_of,
          quantizers.split_tokens(quantized.segments, chunk),
          **options,
        )
      else:
        sample, average = entropy.assignment_entropy(
          quantized.logits, **options
        )
      values.append(sample - average)
    return sum(values) / len(values)


def _fusion_weights(
  params: Mapping[str, PyTree],
) -> dict[str, Float[Array, '']]:
  """Alpha and beta of Eq. (11), for the log."""
  weights = params.get('fuse', {}).get('weights', ())
  names: tuple[str, ...] = ('fusion_alpha', 'fusion_beta')
  return dict(zip(names, list(weights), strict=False))
