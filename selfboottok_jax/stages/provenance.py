"""What a token cache is made by, and which of its fields a generator wants."""

import ml_collections

from selfboottok_jax import trees
from selfboottok_jax.objectives import alignment
from selfboottok_jax.stages import encoding_builder
from selfboottok_jax.stages import frozen_encoders as encoding_lib


def wanted_fields(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """The names of what the encoding of a configuration makes."""
  has_cls, mode = encoding_builder.wanted(config)
  names = ['codes', *(['cls'] if has_cls else [])]
  if mode in alignment.ALIGNMENTS:
    names.append('targets')
  return tuple(names)


def made_by(
  config: ml_collections.ConfigDict,
  encoder: encoding_lib.Encoding,
  tokenizer: str,
) -> dict[str, str]:
  """All that an encoding's numbers depend on, for the index of a cache.

  `tokenizer` is the fingerprint of the tokenizer.
  """
  teacher = encoder.teacher
  return {
    'tokenizer': tokenizer,
    'teacher': config.networks.teacher if teacher else '',
    'teacher_weights': trees.weights_hash(teacher.params) if teacher else '',
    'teacher_dtype': config.model.dtype if teacher else '',
    'align_mode': encoder.align_mode if encoder.has_targets else 'off',
  }
