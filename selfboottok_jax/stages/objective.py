"""Weights and switches of the tokenizer's objective, Eq. (4) and (5)."""

import dataclasses
import math

from selfboottok_jax import errors, sizes
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.objectives import alignment, image_losses, transport
from selfboottok_jax.presets import following
from selfboottok_jax.pretrained import contract

LOCAL_GROUPS = ('local1d', 'local2d')
# The module that predicts the tokens of each group.
MAKERS = {'global': 'encoder', 'local1d': 'local1d', 'local2d': 'local2d'}
INPUTS = ('continuous', 'quantized')
WEIGHTS = (
  *('pixel', 'perceptual', 'adversarial', 'hinge', 'lecam', 'consistency'),
  *('align', 'repa_global', 'repa_local', 'transport', 'kl'),
)


@dataclasses.dataclass(frozen=True)
class Objective:
  """Weights and switches of Eq. (4) and (5); a weight of 0 removes its term.

  Attributes:
    pixel: weight of the pixel loss.
    pixel_kind: 'mse' or 'l1'.
    perceptual: lambda_1.
    perceptual_warmup: linear warm-up of lambda_1, as a fraction of the run.
    adversarial: lambda_2.
    adversarial_start: when the discriminator begins to learn and to count, as
      a fraction of the run; it moves when train.steps is changed.
    adaptive_weight: multiply lambda_2 by `adversarial.adaptive_weight`.
    hinge: weight of hinge and LeCAM in the discriminator's own loss, which
      matters against `consistency`; SoftVQ's code takes lambda_2's value.
    lecam: weight of LeCAM's regulariser beside the hinge.
    consistency: weight of the consistency of logits under stronger
      augmentation in the discriminator's loss.
    augment: probability of each kind of augmentation of what the discriminator
      sees; 0 shows it the images as they are.
    align: lambda_3.
    repa_global: mu_1.
    repa_local: mu_2.
    transport: mu_3.
    repa_mode: how tokens meet patches: 'repeat', 'pool' or 'global'.
    repa_input: align tokens before ('continuous') or after quantisation.
    repa_local_on: the group that Eq. (7) aligns.
    projector_width: hidden width of the heads to the teachers' widths.
    ot_loss: 'transport' or 'debiased'.
    ot_epsilon: entropic regularisation relative to the mean cost.
    ot_iterations: of Sinkhorn.
    kl: lambda_4.
    kl_temperature: of the assignment in the entropy term.
    kl_pool: pool code k over codebooks, as SoftVQ's code does.
  """

  pixel: float = 1.0
  pixel_kind: str = 'mse'
  perceptual: float = 1.0
  perceptual_warmup: float = 0.04
  adversarial: float = 0.2
  adversarial_start: float = 0.08
  adaptive_weight: bool = False
  hinge: float = 0.2
  lecam: float = 0.001
  consistency: float = 4.0
  augment: float = 0.5
  align: float = 0.1
  repa_global: float = 1.0
  repa_local: float = 1.0
  transport: float = 1.0
  repa_mode: str = 'repeat'
  repa_input: str = 'continuous'
  repa_local_on: str = 'local1d'
  projector_width: int = 1024
  ot_loss: str = 'transport'
  ot_epsilon: float = 0.05
  ot_iterations: int = 50
  kl: float = 0.01
  kl_temperature: float = 0.01
  kl_pool: bool = False

  def __post_init__(self) -> None:
    """Raises ConfigError for values that no training can use."""
    for name, choices in (
      ('pixel_kind', image_losses.PIXEL_LOSSES),
      ('repa_mode', alignment.ALIGNMENTS),
      ('repa_input', INPUTS),
      ('repa_local_on', LOCAL_GROUPS),
      ('ot_loss', transport.OT_LOSSES),
    ):
      errors.require_choice(f'loss.{name}', getattr(self, name), choices)
    for name in WEIGHTS:
      value = getattr(self, name)
      errors.require(value >= 0, f'loss.{name}', value, '0 or more')
    for name in ('projector_width', 'ot_iterations'):
      value = getattr(self, name)
      errors.require(value >= 1, f'loss.{name}', value, '1 or more')
    for name in ('kl_temperature', 'ot_epsilon'):
      value = getattr(self, name)
      errors.require(value > 0, f'loss.{name}', value, 'a number above 0')
    for name in ('adversarial_start', 'augment', 'perceptual_warmup'):
      value = getattr(self, name)
      errors.require(
        0 <= value <= 1, f'loss.{name}', value, 'a number from 0 to 1'
      )


def check_pairing(
  model: tokenizer_lib.Tokenizer,
  objective: Objective,
  term: str,
  network: contract.FeatureNetwork,
) -> None:
  """Raises ConfigError unless an alignment can pair tokens with patches.

  Args:
    model: the tokenizer.
    objective: the weights.
    term: 'repa_global' or 'repa_local'.
    network: its teacher.
  """
  patches, mode = math.prod(network.grid(model.image_size)), objective.repa_mode
  count = model.num_tokens
  if alignment.can_pair(patches, count, mode):
    return
  near = following.nearest_count(count, patches, model.num_codebooks)
  fitting = f'--config.model.num_tokens={near}'
  if near is None:
    fitting = (
      f'--config.model.num_tokens to a divisor or a multiple of {patches} that '
      f'model.num_codebooks={model.num_codebooks} divides'
    )
  raise errors.ConfigError(
    f'model.num_tokens={count} cannot be paired with the {patches} patches of '
    f'networks.{term}={network.name} in images of '
    f'{sizes.describe(model.image_size)}, as neither number divides the other; '
    f'set {fitting}, or --config.loss.repa_mode=global'
  )


def active_terms(
  model: tokenizer_lib.Tokenizer,
  objective: Objective,
  trainable: tuple[str, ...] | None = None,
) -> tuple[str, ...]:
  """The terms that need a frozen network, for this model and these weights.

  Args:
    model: the tokenizer; a term on a group that it lacks is left out.
    objective: the weights; a term of weight 0 is left out.
    trainable: names of the trained modules, None for all. A term on tokens
      that none of them changes is a constant, and left out.
  """
  wanted = {
    'perceptual': objective.perceptual > 0,
    'repa_global': objective.align * objective.repa_global > 0,
    'repa_local': objective.align * objective.repa_local > 0
    and objective.repa_local_on in model.groups,
    'transport': objective.align * objective.transport > 0
    and 'local2d' in model.groups,
  }
  if trainable is not None:
    groups = {
      'repa_global': 'global',
      'repa_local': objective.repa_local_on,
      'transport': 'local2d',
    }
    for term, group in groups.items():
      makers = {MAKERS[group], tokenizer_lib.PROJECTOR + term}
      if objective.repa_input == 'quantized' and term != 'transport':
        makers.add(f'quantizer_{group}')
      wanted[term] &= bool(makers & set(trainable))
  return tuple(term for term, active in wanted.items() if active)
