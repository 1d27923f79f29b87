"""Vision transformers: DINOv2, DINO, I-JEPA, SigLIP2, MAE and CLIP."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import sizes
from selfboottok_jax.pretrained import contract, resample, vit

# Mean and deviation of images in [0, 1], as each family was trained.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = (
  (0.48145466, 0.4578275, 0.40821073),
  (0.26862954, 0.26130258, 0.27577711),
)
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Family:
  """Common properties of the networks of one training.

  Attributes:
    naming: key of `vit.NAMINGS`, the names in their files.
    grid: rows (and columns) of the position table in the files.
    patch_size: pixels to a side of a patch in the files.
    fields: fields of `vit.Vit` other than sizes.
    statistics: mean and deviation that images are normalised with.
    prefix: beginning of the arrays to read; others in the file are ignored.
    used_patch_size: patch size of the teacher, where it is not the files'.
    antialias: True if positions reach another grid with antialiasing; None for
      the way of the public class with these names.
  """

  naming: str
  grid: int
  patch_size: int
  fields: Mapping[str, Any]
  statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET
  prefix: str = ''
  used_patch_size: int = 0
  antialias: bool | None = None


# As SoftVQ's teacher: patches of 16 pixels, positions resized by timm.
DINOV2 = Family(
  'dinov2',
  37,
  14,
  {'layer_scale': True},
  used_patch_size=16,
  antialias=True,
)
DINOV2_REGISTERS = dataclasses.replace(
  DINOV2,
  naming='dinov2_registers',
  fields={'layer_scale': True, 'registers': 4},
)
DINO = Family('timm', 14, 16, {})
IJEPA = Family('ijepa', 16, 14, {'cls': False})
SIGLIP2 = Family(
  'siglip',
  16,
  16,
  {'cls': False, 'gelu': 'tanh', 'pool': True},
  HALF,
  'vision_model.',
)
# MAE's encoder alone: it sees all patches, none is masked.
MAE = DINO
CLIP = Family('clip', 14, 16, {'pre_norm': True, 'gelu': 'quick'}, OPENAI)
CLIP_14 = dataclasses.replace(CLIP, grid=16, patch_size=14)


@dataclasses.dataclass(frozen=True)
class Teacher:
  """One size of a family, and where its weights are."""

  family: Family
  width: int
  depth: int
  heads: int
  published: contract.Published | None


def _published(
  repository: str,
  millions: float,
  licence: str = 'Apache-2.0',
  use: str = 'alignment',
) -> contract.Published:
  return contract.Published(
    repository, ('model.safetensors',), licence, millions, use
  )


def _dinov2(repository: str, millions: float) -> contract.Published:
  use = 'alignment, FD, start of the encoder'
  return _published(f'facebook/{repository}', millions, use=use)


def _mae(name: str, millions: float) -> contract.Published:
  return _published(f'timm/{name}', millions, 'CC-BY-NC-4.0', 'FD')


def _clip(name: str, millions: float) -> contract.Published:
  return _published(f'timm/{name}', millions, use='FD')


# (width, depth, heads)
_S, _B, _L = (384, 12, 6), (768, 12, 12), (1024, 24, 16)
_TINY = (48, 2, 3)

TEACHERS: dict[str, Teacher] = {
  'dinov2_s': Teacher(DINOV2, *_S, _dinov2('dinov2-small', 22.1)),
  'dinov2_b': Teacher(DINOV2, *_B, _dinov2('dinov2-base', 86.6)),
  'dinov2_l': Teacher(DINOV2, *_L, _dinov2('dinov2-large', 304.4)),
  'dinov2_s_registers': Teacher(
    DINOV2_REGISTERS, *_S, _dinov2('dinov2-with-registers-small', 22.1)
  ),
  'dinov2_b_registers': Teacher(
    DINOV2_REGISTERS, *_B, _dinov2('dinov2-with-registers-base', 86.6)
  ),
  'dinov2_l_registers': Teacher(
    DINOV2_REGISTERS, *_L, _dinov2('dinov2-with-registers-large', 304.4)
  ),
  'dino_s': Teacher(
    DINO, *_S, _published('timm/vit_small_patch16_224.dino', 21.7)
  ),
  'ijepa_h': Teacher(
    IJEPA,
    *(1280, 32, 16),
    _published('facebook/ijepa_vith14_1k', 630.8, 'CC-BY-NC-4.0'),
  ),
  'siglip2_b': Teacher(
    SIGLIP2, *_B, _published('google/siglip2-base-patch16-256', 92.9)
  ),
  'mae_b': Teacher(MAE, *_B, _mae('vit_base_patch16_224.mae', 85.8)),
  'mae_l': Teacher(MAE, *_L, _mae('vit_large_patch16_224.mae', 303.3)),
  'clip_b': Teacher(CLIP, *_B, _clip('vit_base_patch16_clip_224.openai', 85.8)),
  'clip_l': Teacher(
    CLIP_14, *_L, _clip('vit_large_patch14_clip_224.openai', 303.2)
  ),
  # Nobody publishes these: they run every code path on a small machine.
  'dinov2_tiny': Teacher(DINOV2, *_TINY, None),
  'ijepa_tiny': Teacher(IJEPA, *_TINY, None),
  'siglip2_tiny': Teacher(SIGLIP2, *_TINY, None),
  'clip_tiny': Teacher(CLIP, *_TINY, None),
}


@dataclasses.dataclass(frozen=True, eq=False)
class VisionTransformer:
  """Images in [-1, 1], resized and normalised, through a transformer.

  Patches are those after the final norm; `cls` is the class token there, the
  pooled token of SigLIP, or nothing (I-JEPA).

  Attributes:
    name: one of TEACHERS.
    vit: the transformer; images are resized to its grid of patches, bicubic
      and without antialiasing as is usual for teachers.
    family: properties that it shares with others of its training.
    published: place of its weights; None where nobody publishes any.
    params: those of `vit`, float32; None until they are loaded.
  """

  name: str
  vit: vit.Vit
  family: Family
  published: contract.Published | None
  params: Any = None

  @property
  def dim(self) -> int:
    """Width of a patch vector."""
    return self.vit.width

  @property
  def shape_key(self) -> dict[str, Any]:
    """Returns the settings that change the parameters made of a file."""
    rows, columns = self.vit.grid
    # Text, which `launch.convert` takes as an option.
    grid = rows if rows == columns else f'{rows}x{columns}'
    return {'grid': grid, 'patch_size': self.vit.patch_size}

  def grid(self, image_size: sizes.Size) -> tuple[int, int]:
    """(rows, columns) of patches, whatever the size of the images."""
    del image_size
    return self.vit.grid

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Features in float32 of images in [-1, 1]."""
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    rows, columns = (count * self.vit.patch_size for count in self.vit.grid)
    x = resample.resize_images(x, (rows, columns))
    mean, deviation = (np.asarray(s) for s in self.family.statistics)
    # The statistics are of [0, 1]; images here are in [-1, 1].
    shift, scale = 2 * mean - 1, 2 * deviation
    x = (x - shift.astype(x.dtype)[None, None, None]) / scale.astype(x.dtype)[
      None, None, None
    ]
    output: Any = self.vit.apply({'params': params}, x)
    return contract.Features(output.patches, output.summary)

  def init(self, key: Any) -> PyTree:
    """Random parameters; traceable, so that shapes cost nothing."""
    rows, columns = (count * self.vit.patch_size for count in self.vit.grid)
    image = jnp.zeros((1, rows, columns, 3))
    params = dict(self.vit.init(key, image)['params'])
    return _with_gains(params) if self.vit.layer_scale else params

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> PyTree:
    """Parameters from a published state dict.

    Raises:
      WeightsError: names or shapes are not this network's.
    """
    prefix, side = self.family.prefix, self.family.grid
    kept = {n: array for n, array in arrays.items() if n.startswith(prefix)}
    # Most families are published in both ways.
    naming = 'timm' if vit.is_timm(arrays) else self.family.naming
    names = vit.NAMINGS[naming]
    if self.family.antialias is not None:
      names = dataclasses.replace(names, antialias=self.family.antialias)
    return vit.read(
      kept or arrays,
      self.vit,
      names,
      source,
      grid=(side, side),
      patch_size=self.family.patch_size,
    )


def _with_gains(params: PyTree) -> PyTree:
  """Random parameters under which blocks matter: trained gains are not 1e-5."""

  def grow(path: Any, leaf: Array) -> Array:
    is_gain = path[-1].key in ('scale1', 'scale2')
    return jnp.full_like(leaf, 0.3) if is_gain else leaf

  return jax.tree_util.tree_map_with_path(grow, params)


def build(
  name: str,
  grid: sizes.Size = 16,
  patch_size: int = 0,
  dtype: str = 'float32',
  attention: str = 'auto',
) -> VisionTransformer:
  """A transformer without its weights.

  Args:
    name: one of TEACHERS.
    grid: rows (and columns) of patches that it returns, or (rows, columns).
    patch_size: pixels to a side of a patch; 0 for the size that is usual for
      teachers: 16 for DINOv2 (14 in the files), else that of its training. The
      patch embedding is resampled, see `resample`.
    dtype: floating-point type of the computation.
    attention: implementation, see `layers.Attention`.
  """
  rows, columns = sizes.pair(grid)
  contract.check_options(
    name, dtype=dtype, attention=attention, grid=min(rows, columns)
  )
  contract.check_options(name, least=0, patch_size=patch_size)
  teacher = TEACHERS[name]
  family = teacher.family
  network = vit.Vit(
    (rows, columns),
    patch_size or family.used_patch_size or family.patch_size,
    teacher.width,
    teacher.depth,
    teacher.heads,
    4 * teacher.width,
    attention=attention,
    dtype=dtype,
    **family.fields,
  )
  return VisionTransformer(name, network, family, teacher.published)
