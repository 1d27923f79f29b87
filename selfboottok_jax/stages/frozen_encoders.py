"""Frozen networks that turn an image into the inputs of a generator.

Images become the codes that it models and, with a teacher, the class vector
that is entangled with them (REG) and the targets of its alignment (REPA). The
same object encodes inside a train step, for an evaluation and for a token
cache, so that all of them see the same numbers.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors, pretrained, sizes, trees
from selfboottok_jax.objectives import alignment
from selfboottok_jax.pretrained import contract

# Pairings of tokens with a teacher's patches; the last two pair none.
ALIGN_MODES = (*alignment.ALIGNMENTS, 'cls_only', 'off')


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenEncoders:
  """Encodes images into 'codes' and, where wanted, 'cls' and 'targets'.

  Attributes:
    tokenizer: makes the codes.
    teacher: makes the class vector and the targets; None if neither is wanted.
    has_cls: make the class vector.
    align_mode: one of ALIGN_MODES; 'cls_only' and 'off' want no targets.

  Raises:
    ConfigError: something is wanted that the teacher lacks.
  """

  tokenizer: contract.ImageEncoder
  teacher: contract.FeatureNetwork | None = None
  has_cls: bool = False
  align_mode: str = 'off'

  def __post_init__(self) -> None:
    """Raises ConfigError for a combination that cannot be computed."""
    errors.require_choice('loss.align_mode', self.align_mode, ALIGN_MODES)
    if self.teacher is None and (self.has_cls or self.has_targets):
      raise errors.ConfigError(
        'a class token and an alignment need a teacher; name networks.teacher'
      )

  @property
  def has_targets(self) -> bool:
    """True if targets of the alignment are made."""
    return self.align_mode in alignment.ALIGNMENTS

  @property
  def params(self) -> dict[str, PyTree]:
    """Parameters by network: 'tokenizer' and, if there is one, 'teacher'."""
    params = {'tokenizer': self.tokenizer.params}
    if self.teacher is not None:
      params['teacher'] = self.teacher.params
    return params

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> dict[str, Float[Array, 'b ...']]:
    """Encodes images in [-1, 1]; no gradient passes.

    Returns:
      float32 'codes' [b, k, e], 'cls' [b, c] and 'targets' [b, m, d], see
      `alignment.make_targets`.
    """
    # The scopes are the rows of the cost card.
    with jax.named_scope('tokenizer'):
      out = {'codes': self.tokenizer.encode(params['tokenizer'], images)}
    if self.teacher is not None:
      with jax.named_scope('teacher'):
        features = self.teacher(params['teacher'], images)
      if self.has_cls:
        if features.cls is None:
          raise errors.ConfigError(
            f'networks.teacher={self.teacher.name} has no class vector; wanted '
            'another teacher, or loss.cls=0'
          )
        out['cls'] = features.cls
      if self.has_targets:
        out['targets'] = alignment.make_targets(
          features.patches, self.tokenizer.num_tokens, mode=self.align_mode
        )
    return {
      k: jax.lax.stop_gradient(v.astype(jnp.float32)) for k, v in out.items()
    }

  @functools.cached_property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and type of each output for one image, without the batch axis."""
    size = sizes.pair(self.tokenizer.image_size)
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    made: dict[str, Any] = jax.eval_shape(self, self.params, image)
    return {
      name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
      for name, leaf in made.items()
    }


def from_config(
  config: ml_collections.ConfigDict,
  tokenizer: contract.ImageEncoder,
  patch_size: int,
  *,
  abstract: bool = False,
) -> FrozenEncoders:
  """The frozen encoders that a generator's configuration asks for.

  Args:
    config: of a generator.
    tokenizer: makes the codes.
    patch_size: of the tokenizer; teachers without weights take patches of it.
    abstract: give the teacher shapes in place of parameters, and read no file.
  """
  has_cls, mode = _wanted(config)
  teacher = None
  if has_cls or mode != 'off':
    teacher = load_teacher(
      config.networks.teacher,
      tokenizer.image_size,
      patch_size,
      dtype=config.model.dtype,
      attention=config.model.attention,
      abstract=abstract,
    )
  encoders = FrozenEncoders(tokenizer, teacher, has_cls, mode)
  check_pairing(encoders)
  return encoders


def check_pairing(encoders: FrozenEncoders) -> None:
  """Raises ConfigError unless the codes pair with the teacher's patches."""
  teacher, mode = encoders.teacher, encoders.align_mode
  if teacher is None or not encoders.has_targets:
    return
  size, count = encoders.tokenizer.image_size, encoders.tokenizer.num_tokens
  patches = math.prod(teacher.grid(size))
  if not alignment.can_pair(patches, count, mode):
    raise errors.ConfigError(
      f'loss.align_mode={mode} cannot pair the {count} tokens of the tokenizer '
      f'with the {patches} patches of networks.teacher={teacher.name} in '
      f'images of {sizes.describe(size)}, as neither number divides the '
      'other; set --config.loss.align_mode=global, cls_only or off, or train '
      'a tokenizer with another model.num_tokens'
    )


def wanted_fields(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The names of what the encoders of a configuration make."""
  has_cls, mode = _wanted(config)
  names = ['codes', *(['cls'] if has_cls else [])]
  if mode in alignment.ALIGNMENTS:
    names.append('targets')
  return tuple(names)


def made_by(
  config: ml_collections.ConfigDict, encoders: FrozenEncoders, fingerprint: str
) -> dict[str, str]:
  """Collects all that the encoders' outputs depend on.

  It is `made_by` of a token cache's index; `fingerprint` is the tokenizer's.
  """
  teacher = encoders.teacher
  return {
    'tokenizer': fingerprint,
    'teacher': config.networks.teacher if teacher else '',
    'teacher_weights': trees.weights_hash(teacher.params) if teacher else '',
    'teacher_dtype': config.model.dtype if teacher else '',
    'align_mode': encoders.align_mode if encoders.has_targets else 'off',
  }


def load_teacher(
  spec: str,
  image_size: sizes.Size,
  patch_size: int,
  *,
  dtype: str,
  attention: str = 'auto',
  abstract: bool = False,
) -> contract.FeatureNetwork:
  """A teacher on the tokenizer's grid of patches.

  Transformers see patches of the size that they were trained with: DINOv2 at
  256 pixels is shown 16 x 16 patches of 14, as in REPA and REG.
  """
  patches = pretrained.Patches(
    image_size,
    patch_size,
    dim=64,
    dtype=dtype,
    attention=attention,
    native=True,
  )
  return pretrained.load_network(spec, patches=patches, abstract=abstract)


def _wanted(config: ml_collections.ConfigDict) -> tuple[bool, str]:
  """(class vector wanted, mode of the alignment) of a configuration."""
  if not config.networks.teacher:
    return False, 'off'
  goal = config.loss
  return goal.cls > 0, goal.align_mode if goal.align else 'off'
