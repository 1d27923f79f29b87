"""What turns images into codes, class vectors and targets of a generator."""

import ml_collections

from selfboottok_jax import pretrained
from selfboottok_jax.pretrained import contract
from selfboottok_jax.stages import frozen_encoders


def build_encoding(
  config: ml_collections.ConfigDict,
  codec: contract.ImageEncoder,
  patch_size: int,
  *,
  abstract: bool = False,
) -> frozen_encoders.Encoding:
  """The encoding that a generator's configuration asks for.

  Args:
    config: of a generator.
    codec: of its tokenizer.
    patch_size: of the tokenizer; teachers without weights take patches of it.
    abstract: the teacher has shapes alone.
  """
  has_cls, mode = wanted(config)
  teacher = None
  if has_cls or mode != 'off':
    teacher = load_teacher(
      config.networks.teacher,
      codec.image_size,
      patch_size,
      dtype=config.model.dtype,
      abstract=abstract,
    )
  return frozen_encoders.Encoding(codec, teacher, has_cls, mode)


def wanted(config: ml_collections.ConfigDict) -> tuple[bool, str]:
  """Whether a class vector is wanted, and the mode of the alignment."""
  if not config.networks.teacher:
    return False, 'off'
  goal = config.loss
  return goal.cls > 0, goal.align_mode if goal.align else 'off'


def load_teacher(
  spec: str,
  image_size: int,
  patch_size: int,
  *,
  dtype: str,
  abstract: bool = False,
) -> contract.FeatureNetwork:
  """A teacher on the tokenizer's grid of patches.

  Transformers see patches of the size that they were trained with: DINOv2 at
  256 pixels is shown 16 x 16 patches of 14, as in REPA and REG.
  """
  patches = pretrained.Patches(
    image_size, patch_size, dim=64, dtype=dtype, native=True
  )
  return pretrained.load_network(spec, patches=patches, abstract=abstract)
