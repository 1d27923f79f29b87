"""The loss of the tokenizer, Eq. (4): of all of it (stage 1) or of a part."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import sizes, stages
from selfboottok_jax.evaluation import cost
from selfboottok_jax.models import aligners, layers, quantizers
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.objectives import (
  adversarial,
  alignment,
  entropy,
  image_losses,
  transport,
)
from selfboottok_jax.pretrained import contract
from selfboottok_jax.stages import critic as critic_lib
from selfboottok_jax.stages import objective as objective_lib
from selfboottok_jax.training import state as state_lib

Scalar = Float[Array, '']
Images = Float[Array, 'b h w 3']
Statistics = dict[str, PyTree]
# Name of a term to its weight and its loss, a function of the reconstruction
# that returns the value and the statistics after it.
PixelTerms = dict[
  str, tuple[float | Scalar, Callable[[Images], tuple[Scalar, Statistics]]]
]
# Name of a term to its (weight, value).
Terms = dict[str, tuple[float | Scalar, Scalar]]


class TokenizerTask:
  """Eq. (4) for a tokenizer, against frozen networks and a discriminator.

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
    """Decides which terms, groups and phases the training has.

    Args:
      model: the tokenizer.
      objective: weights of the terms.
      networks: feature networks and the perceptual distance, by term.
      critic: the discriminator, or None without an adversarial term.
      steps: length of the training; warm-ups and starts are fractions of it.
      trainable: names of the modules that learn, None for all.
    """
    self.model, self.objective, self.critic = model, objective, critic
    active = objective_lib.active_terms(model, objective, trainable)
    self.networks = {t: n for t, n in networks.items() if t in active}
    # Two terms may name the same network: it is one argument of the step, under
    # the first term's name, and runs once.
    self._owner = {
      term: next(t for t, n in self.networks.items() if n is network)
      for term, network in self.networks.items()
    }
    self.frozen = {t: self.networks[t].params for t in self._owner.values()}
    self.warmup_steps = round(objective.perceptual_warmup * steps)
    self.start_step = round(objective.adversarial_start * steps)
    self.groups: tuple[str, ...] = ('tokenizer',)
    self.milestones: tuple[int, ...] = (0,)
    if critic is not None:
      self.groups += (critic_lib.GROUP,)
      self.frozen |= critic.frozen
      starts = sorted({0, self.start_step})
      # A discriminator that would start at the end never does.
      self.milestones = tuple(m for m in starts if m < max(steps, 1))
    self.ema_groups: tuple[str, ...] = ('tokenizer',)
    self.example = stages.image_example(model.image_size)
    self._projectors = {
      tokenizer_lib.PROJECTOR + term: aligners.Projector(
        self.networks[term].dim, objective.projector_width, model.dtype
      )
      for term in ('repa_global', 'repa_local', 'transport')
      if term in self.networks and self._needs_projector(term)
    }

  def losses(self, first_step: int) -> dict[str, state_lib.Loss]:
    """The losses of a phase: with the discriminator, or before its start."""
    critic = self.critic if first_step >= self.start_step else None
    losses: dict[str, state_lib.Loss] = {
      'tokenizer': functools.partial(self._tokenizer_loss, critic)
    }
    if critic is not None:
      losses[critic_lib.GROUP] = critic.loss
    return {name: stages.normalised(loss) for name, loss in losses.items()}

  def init(self, rng: Any) -> tuple[dict[str, PyTree], Statistics]:
    """Fresh parameters of both groups, and the discriminator's statistics."""
    model_key, head_key, critic_key = jax.random.split(rng, 3)
    image = jnp.zeros((1, *sizes.pair(self.model.image_size), 3))
    group = dict(self.model.init(model_key, image)['params'])
    tokens = jnp.zeros((1, self.model.num_tokens, self.model.token_dim))
    for index, (name, head) in enumerate(self._projectors.items()):
      key = jax.random.fold_in(head_key, index)
      group[name] = head.init(key, tokens)['params']
    params: dict[str, PyTree] = {'tokenizer': group}
    stats: Statistics = {}
    if self.critic is not None:
      params[critic_lib.GROUP], stats = self.critic.init(critic_key, image)
    return params, stats

  def components(self, params: Mapping[str, PyTree]) -> list[cost.Component]:
    """The tokenizer's modules, heads, discriminator and frozen networks."""
    found = [
      cost.Component(module, of_module, group == 'tokenizer')
      for group in ('tokenizer', 'base')
      for module, of_module in params.get(group, {}).items()
    ]
    if self.critic is not None:
      name = critic_lib.GROUP
      found.append(cost.Component(name, params[name], True))
    return found + [
      cost.Component(name, frozen, False)
      for name, frozen in self.frozen.items()
    ]

  def _tokenizer_loss(
    self,
    critic: critic_lib.Critic | None,
    trained: PyTree,
    inputs: state_lib.LossInputs,
  ) -> tuple[Scalar, state_lib.LossOutputs]:
    """Eq. (4); `critic` is None before the discriminator's start."""
    o = self.objective
    output: tokenizer_lib.TokenizerOutput
    # The base comes first, so that a trained module replaces its namesake.
    params = inputs.params.get('base', {}) | trained
    output, variables = self.model.apply(
      {'params': tokenizer_lib.model_params(params)},
      inputs.batch['image'],
      train=True,
      rngs={'groups': inputs.rng},
      mutable=['intermediates'],
    )
    pixel_terms = self._pixel_terms(critic, inputs)
    terms: Terms = {}
    stats = inputs.stats
    if critic is not None and o.adaptive_weight:
      (features,) = variables['intermediates']['decoder']['features']
      terms, stats = self._balance(pixel_terms, output.reconstruction, features)
    else:
      for name, (weight, loss) in pixel_terms.items():
        value, stats = loss(output.reconstruction)
        terms[name] = weight, value
    align_terms, diagnostics = self._align(params, inputs, output)
    terms |= align_terms
    if o.kl:
      terms['kl'] = o.kl, self._kl(output)
    total = sum((w * value for w, value in terms.values()), jnp.zeros(()))
    metrics = {f'loss/{name}': value for name, (_, value) in terms.items()}
    if critic is not None and o.adaptive_weight:
      weight = jnp.asarray(terms['adversarial'][0])
      metrics['critic/adversarial_weight'] = weight
    metrics['train/psnr'] = image_losses.psnr(
      inputs.batch['image'], jax.lax.stop_gradient(output.reconstruction)
    )
    return total, state_lib.LossOutputs(
      metrics=metrics | diagnostics | self.model.fusion_scalars(params),
      stats=stats,
      # The discriminator sees the reconstruction of this very step: handing it
      # on saves a second forward of the tokenizer.
      carry={'reconstruction': jax.lax.stop_gradient(output.reconstruction)},
    )

  def _pixel_terms(
    self, critic: critic_lib.Critic | None, inputs: state_lib.LossInputs
  ) -> PixelTerms:
    """The terms that see the reconstruction alone, the adversarial one last.

    Only the last may change the statistics: the others return them as given.
    """
    o, images, stats = self.objective, inputs.batch['image'], inputs.stats
    terms: PixelTerms = {}
    if o.pixel:
      terms['pixel'] = (
        o.pixel,
        lambda x: (
          image_losses.pixel_loss(images, x, kind=o.pixel_kind),
          stats,
        ),
      )
    if 'perceptual' in self.networks:
      terms['perceptual'] = (
        o.perceptual * image_losses.warm_up(inputs.step, self.warmup_steps),
        lambda x: (self._perceptual(inputs, x), stats),
      )
    if critic is not None:
      # Group dropout draws from inputs.rng itself, so this needs another key.
      key = jax.random.fold_in(inputs.rng, 1)
      terms['adversarial'] = (
        o.adversarial,
        lambda x: critic.fooling_loss(x, inputs, key),
      )
    return terms

  def _balance(
    self,
    pixel_terms: PixelTerms,
    reconstruction: Images,
    features: Float[Array, 'b n d'],
  ) -> tuple[Terms, Statistics]:
    """Scales lambda_2 so that both sides pull equally at the last layer.

    As VQGAN's adaptive weight, but without a backward pass of its own: the
    gradient of each loss in the reconstruction is all that is needed, and the
    training's own backward pass uses it again.
    """
    terms: Terms = {}
    gradients = {}
    stats: Statistics = {}
    for name, (weight, loss) in pixel_terms.items():
      value, stats, gradient = adversarial.pull(loss, reconstruction)
      terms[name] = weight, value
      # The last layer makes patches, so its gradients are cut the same way.
      gradients[name] = layers.patchify(gradient, self.model.patch_size)
    away = gradients.pop('adversarial')
    towards = sum(
      (terms[name][0] * gradient for name, gradient in gradients.items()),
      jnp.zeros_like(away),
    )
    ratio = adversarial.adaptive_weight(features, towards, away)
    unscaled, value = terms['adversarial']
    return terms | {'adversarial': (unscaled * ratio, value)}, stats

  def _perceptual(
    self, inputs: state_lib.LossInputs, reconstruction: Images
  ) -> Scalar:
    """The distance, without its weight and the warm-up of that."""
    with jax.named_scope('perceptual'):
      return image_losses.perceptual_loss(
        self.networks['perceptual'],
        inputs.frozen[self._owner['perceptual']],
        inputs.batch['image'],
        reconstruction,
      )

  def _align(
    self,
    params: PyTree,
    inputs: state_lib.LossInputs,
    output: tokenizer_lib.TokenizerOutput,
  ) -> tuple[Terms, dict[str, Scalar]]:
    """Eq. (5): the weighted terms, and diagnostics of the transport."""
    o = self.objective
    terms: Terms = {}
    diagnostics: dict[str, Scalar] = {}
    # A network that serves two terms runs once.
    see = functools.cache(functools.partial(self._features, inputs))
    for term, group in (
      ('repa_global', 'global'),
      ('repa_local', o.repa_local_on),
    ):
      if term not in self.networks:
        continue
      features = see(self._owner[term])
      if o.repa_input == 'continuous':
        tokens = output.tokens[group]
      else:
        tokens = output.quantized[group].codes
      if o.repa_mode == 'global':
        # SoftVQ's code projects the mean token, not each token.
        tokens = jnp.mean(tokens, axis=1, keepdims=True)
      projected = self._project(params, term, tokens)
      terms[term] = (
        o.align * getattr(o, term),
        alignment.alignment_loss(features.patches, projected, mode=o.repa_mode),
      )
    if 'transport' in self.networks:
      features = see(self._owner['transport'])
      tokens = self._project(params, 'transport', output.tokens['local2d'])
      result = transport.transport_loss(
        features.patches,
        tokens,
        ot_loss=o.ot_loss,
        relative_epsilon=o.ot_epsilon,
        num_iterations=o.ot_iterations,
      )
      terms['transport'] = o.align * o.transport, result.loss
      diagnostics |= {
        'transport/token_spread': result.spread,
        'transport/plan_spread': result.plan_spread,
        'transport/marginal_error': result.marginal_error,
        'transport/converged': result.converged,
      }
    return terms, diagnostics

  def _needs_projector(self, term: str) -> bool:
    """Tells whether a learned head carries tokens to the network's width.

    Always for REPA. For the transport only where the widths differ, and then on
    the tokens' side: were the latents' side trained, zero would be optimal.
    """
    width = self.networks[term].dim
    return term != 'transport' or width != self.model.token_dim

  def _project(
    self, params: PyTree, term: str, tokens: Float[Array, 'b k e']
  ) -> Float[Array, 'b k d']:
    name = tokenizer_lib.PROJECTOR + term
    if name not in self._projectors:
      return tokens
    with jax.named_scope(name):
      head: Any = self._projectors[name]
      return head.apply({'params': params[name]}, tokens)

  def _features(
    self, inputs: state_lib.LossInputs, term: str
  ) -> contract.Features:
    """A teacher's features of the images."""
    with jax.named_scope(term):
      return self.networks[term](inputs.frozen[term], inputs.batch['image'])

  def _kl(self, output: tokenizer_lib.TokenizerOutput) -> Scalar:
    """The entropy term of the codebooks, a mean over the token groups.

    A mean and not a sum: the weight of the term is then the same for models
    with one, two or three groups.
    """
    o, chunk = self.objective, self.model.quantizer_chunk
    options: dict[str, Any] = {
      'temperature': o.kl_temperature,
      'pool': o.kl_pool,
    }
    values = []
    for quantized in output.quantized.values():
      if chunk:
        # Logits of a few tokens at a time, see `Tokenizer.quantizer_chunk`.
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
    return sum(values, jnp.zeros(())) / len(values)
