"""What a generator learns from an image, computed by frozen networks.

Images become the codes that it models and, with a teacher, the class vector
that is entangled with them (REG) and the targets of its alignment (REPA). The
same object encodes inside a train step, for an evaluation and for a cache, so
that all of them see the same numbers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors
from selfboottok_jax.objectives import alignment
from selfboottok_jax.pretrained import contract

# How tokens are paired with a teacher's patches; the last two with none.
ALIGN_MODES = (*alignment.ALIGNMENTS, 'cls_only', 'off')


@dataclasses.dataclass(frozen=True, eq=False)
class Encoding:
  """Images to a dict of 'codes' and, where they are wanted, 'cls', 'targets'.

  Attributes:
    codec: makes the codes.
    teacher: makes the others; None where nothing else is wanted.
    has_cls: whether the class vector is wanted.
    align_mode: one of ALIGN_MODES; 'cls_only' and 'off' want no targets.

  Raises:
    ConfigError: something is wanted that the teacher has not.
  """

  codec: contract.ImageEncoder
  teacher: contract.FeatureNetwork | None = None
  has_cls: bool = False
  align_mode: str = 'off'

  def __post_init__(self):
    """Refuses what cannot be made."""
    if self.align_mode not in ALIGN_MODES:
      raise errors.ConfigError(
        f'loss.align_mode={self.align_mode!r}; wanted one of '
        f'{", ".join(ALIGN_MODES)}'
      )
    if self.teacher is None and (self.has_cls or self.has_targets):
      raise errors.ConfigError(
        'a class token and an alignment need a teacher; name networks.teacher'
      )

  @property
  def has_targets(self) -> bool:
    """Whether targets of alignment are made."""
    return self.align_mode in alignment.ALIGNMENTS

  @property
  def params(self) -> dict[str, PyTree]:
    """Parameters by network."""
    params = {'tokenizer': self.codec.params}
    if self.teacher is not None:
      params['teacher'] = self.teacher.params
    return params

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> dict[str, Float[Array, 'b ...']]:
    """Encodes images in [-1, 1]; float32.

    codes [b, k, e], cls [b, c], targets [b, m, d] as `alignment.make_targets`.
    """
    with jax.named_scope('tokenizer'):
      out = {'codes': self.codec.encode(params['tokenizer'], images)}
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
          features.patches, self.codec.num_tokens, mode=self.align_mode
        )
    return {
      k: jax.lax.stop_gradient(v.astype(jnp.float32)) for k, v in out.items()
    }

  @functools.cached_property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """What a call makes of one image, without the batch axis."""
    size = self.codec.image_size
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    made: dict[str, Any] = jax.eval_shape(self, self.params, image)
    return {
      name: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
      for name, leaf in made.items()
    }
