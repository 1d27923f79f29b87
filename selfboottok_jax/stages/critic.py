"""The tokenizer's adversary: a discriminator, its loss, its frozen trunk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from selfboottok_jax.models import discriminators
from selfboottok_jax.objectives import adversarial, diffaug
from selfboottok_jax.pretrained import dino
from selfboottok_jax.stages import objective as objective_lib
from selfboottok_jax.training import state as state_lib

# Keys of the trained parameters and their statistics, and of the frozen ones.
GROUP, TRUNK = 'discriminator', 'discriminator_trunk'


@dataclasses.dataclass(frozen=True)
class Critic:
  """A discriminator that is trained against the tokenizer.

  Attributes:
    module: the trained network.
    objective: weights of the losses, and the strength of augmentations.
    trunk: the frozen network whose activations `module` reads; None if it
      reads images.
  """

  module: (
    discriminators.StyleGanDiscriminator | discriminators.DinoDiscriminator
  )
  objective: objective_lib.Objective
  trunk: dino.DinoTrunk | None = None

  @property
  def frozen(self) -> dict[str, PyTree]:
    """Parameters that are arguments of every step."""
    return {} if self.trunk is None else {TRUNK: self.trunk.params}

  def init(
    self, key: Any, image: Float[Array, '1 h w 3']
  ) -> tuple[PyTree, dict[str, PyTree]]:
    """Initialises the discriminator's parameters and statistics.

    The statistics are LeCAM's running means and the variables of its norms.
    """
    seen = image if self.trunk is None else self.trunk.examples()
    variables = self.module.init(key, seen)
    stats = {'lecam': adversarial.init_lecam()}
    if discriminators.NORMS in variables:
      stats[GROUP] = variables[discriminators.NORMS]
    return variables['params'], stats

  def fooling_loss(
    self,
    reconstruction: Float[Array, 'b h w 3'],
    inputs: state_lib.LossInputs,
    key: Any,
  ) -> tuple[Float[Array, ''], dict[str, PyTree]]:
    """The tokenizer's adversarial loss, and the statistics after it.

    Low where the discriminator takes reconstructions for images.
    """
    logits, stats = self._judge(
      inputs.params[GROUP], inputs.stats, inputs.frozen, reconstruction, key,
      self._weak,
    )  # fmt: skip
    return adversarial.hinge_generator(logits), stats

  def loss(
    self, trained: PyTree, inputs: state_lib.LossInputs
  ) -> tuple[Float[Array, ''], state_lib.LossOutputs]:
    """The discriminator's own loss: hinge, LeCAM and consistency.

    Forwards follow each other as in SoftVQ's code: images, reconstructions,
    and both again under strong augmentation, each with draws of its own. Every
    forward normalises by its own batch and updates the norms' statistics.
    """
    o, stats = self.objective, inputs.stats
    logits: list[Array] = []
    pair = (inputs.batch['image'], inputs.carry['reconstruction'])
    strengths = (self._weak, diffaug.STRONG)[: 2 if o.consistency else 1]
    for strength in strengths:
      for images in pair:
        key = jax.random.fold_in(inputs.rng, len(logits))
        judged, stats = self._judge(
          trained, stats, inputs.frozen, images, key, strength
        )
        logits.append(judged)
    real, fake, *again = logits
    hinge = adversarial.hinge_discriminator(real, fake)
    regulariser, means = adversarial.lecam(stats['lecam'], real, fake)
    loss = o.hinge * (hinge + o.lecam * regulariser)
    metrics = {
      'critic/logits_real': jnp.mean(real),
      'critic/logits_fake': jnp.mean(fake),
      # Of the logits, of which an image may have many.
      'critic/accuracy_real': jnp.mean((real > 0).astype(jnp.float32)),
      'critic/accuracy_fake': jnp.mean((fake < 0).astype(jnp.float32)),
    }
    if again:
      strong_real, strong_fake = again
      apart = adversarial.consistency((real, fake), (strong_real, strong_fake))
      loss += o.consistency * apart
      metrics['critic/consistency'] = apart
    return loss, state_lib.LossOutputs(
      metrics=metrics, stats=stats | {'lecam': means}, carry=inputs.carry
    )

  @property
  def _weak(self) -> diffaug.Strength:
    """The augmentation that images and reconstructions always get."""
    return dataclasses.replace(diffaug.WEAK, probability=self.objective.augment)

  def _judge(
    self,
    params: PyTree,
    stats: dict[str, PyTree],
    frozen: dict[str, PyTree],
    images: Float[Array, 'b h w 3'],
    key: Any,
    strength: diffaug.Strength,
  ) -> tuple[Float[Array, 'b *n'], dict[str, PyTree]]:
    """Judges images that are augmented first; see `judge`."""
    view_key, draw_key = jax.random.split(key)
    if strength.probability:
      draws = diffaug.draw(draw_key, images.shape, strength)
      images = diffaug.augment(images, draws, strength)
    return self.judge(params, stats, frozen, images, view_key)

  def judge(
    self,
    params: PyTree,
    stats: dict[str, PyTree],
    frozen: dict[str, PyTree],
    images: Float[Array, 'b h w 3'],
    key: Any,
  ) -> tuple[Float[Array, 'b *n'], dict[str, PyTree]]:
    """Logits of images in one training forward, and the new statistics.

    `key` draws the trunk's view of the images.
    """
    module: Any = self.module
    if self.trunk is None:
      with jax.named_scope(GROUP):
        return module.apply({'params': params}, images), stats
    # A scope beside that of the heads, not inside it: the cost card has a row
    # for each.
    with jax.named_scope(TRUNK):
      _, height, width, _ = images.shape
      view = self.trunk.draw(key, (height, width))
      activations = self.trunk(frozen[TRUNK], images, view)
    with jax.named_scope(GROUP):
      logits, variables = module.apply(
        {'params': params, discriminators.NORMS: stats[GROUP]},
        activations,
        train=True,
        mutable=[discriminators.NORMS],
      )
    return logits, stats | {GROUP: variables[discriminators.NORMS]}
