"""Vision transformers as frozen teachers: which there are, what they want."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax.pretrained import (
  contract,
  published,
  resample,
  vit,
  vit_weights,
)

# Mean and deviation of images in [0, 1], as each family was trained.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class Family:
  """What the networks of one training have in common.

  Attributes:
    layout: of their files, see `vit_weights.LAYOUTS`.
    grid: rows (and columns) of the position table in the files.
    patch_size: of the files.
    fields: of `vit.Vit`, but for sizes.
    statistics: mean and deviation that images are normalised with.
    prefix: of the arrays that count; others in the file are left alone.
    used_patch_size: of the teacher, where it is not that of the files.
    antialias: how positions reach another grid, see `vit_weights.read`.
  """

  layout: str
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
  layout='dinov2_registers',
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


@dataclasses.dataclass(frozen=True)
class Variant:
  """One size of a family, and where its weights are."""

  family: Family
  width: int
  depth: int
  heads: int
  published: published.Published | None


def _dinov2(repository: str, millions: float) -> published.Published:
  return published.Published(
    f'facebook/{repository}',
    ('model.safetensors',),
    'Apache-2.0',
    millions,
    'alignment, FD, start of the encoder',
  )


_B = (768, 12, 12)
_TINY = (48, 2, 3)

VARIANTS: dict[str, Variant] = {
  'dinov2_s': Variant(DINOV2, 384, 12, 6, _dinov2('dinov2-small', 22.1)),
  'dinov2_b': Variant(DINOV2, *_B, _dinov2('dinov2-base', 86.6)),
  'dinov2_l': Variant(DINOV2, 1024, 24, 16, _dinov2('dinov2-large', 304.4)),
  'dinov2_s_registers': Variant(
    DINOV2_REGISTERS,
    *(384, 12, 6),
    _dinov2('dinov2-with-registers-small', 22.1),
  ),
  'dinov2_b_registers': Variant(
    DINOV2_REGISTERS, *_B, _dinov2('dinov2-with-registers-base', 86.6)
  ),
  'dinov2_l_registers': Variant(
    DINOV2_REGISTERS,
    *(1024, 24, 16),
    _dinov2('dinov2-with-registers-large', 304.4),
  ),
  'dino_s': Variant(
    DINO,
    *(384, 12, 6),
    published.Published(
      'timm/vit_small_patch16_224.dino',
      ('model.safetensors',),
      'Apache-2.0',
      21.7,
      'alignment',
    ),
  ),
  'ijepa_h': Variant(
    IJEPA,
    *(1280, 32, 16),
    published.Published(
      'facebook/ijepa_vith14_1k',
      ('model.safetensors',),
      'CC-BY-NC-4.0',
      630.8,
      'alignment',
    ),
  ),
  'siglip2_b': Variant(
    SIGLIP2,
    *_B,
    published.Published(
      'google/siglip2-base-patch16-256',
      ('model.safetensors',),
      'Apache-2.0',
      92.9,
      'alignment',
    ),
  ),
  # Of no published weights: to run every code path on a small machine.
  'dinov2_tiny': Variant(DINOV2, *_TINY, None),
  'ijepa_tiny': Variant(IJEPA, *_TINY, None),
  'siglip2_tiny': Variant(SIGLIP2, *_TINY, None),
}


@dataclasses.dataclass(frozen=True, eq=False)
class VisionTransformer:
  """Images in [-1, 1], resized and normalised, through a transformer.

  Patches are those after the final norm; `cls` is the class token there, the
  pooled token of SigLIP, or nothing (I-JEPA).

  Attributes:
    name: one of VARIANTS.
    vit: the transformer; images are resized to its grid of patches, bicubic
      and without antialiasing as is usual for teachers.
    family: what it was trained on.
    published: where its weights are; None where nobody publishes any.
    params: those of `vit`, float32; None until they are loaded.
  """

  name: str
  vit: vit.Vit
  family: Family
  published: published.Published | None
  params: Any = None

  @property
  def dim(self) -> int:
    """Width of a patch vector."""
    return self.vit.width

  @property
  def shape_key(self) -> dict[str, Any]:
    """What the parameters depend on besides the file."""
    return {'grid': self.vit.grid[0], 'patch_size': self.vit.patch_size}

  def grid(self, image_size: int) -> tuple[int, int]:
    """(rows, columns) of patches, whatever the size of the images."""
    del image_size
    return self.vit.grid

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3']
  ) -> contract.Features:
    """Features in float32 of images in [-1, 1]."""
    size = [count * self.vit.patch_size for count in self.vit.grid]
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    x = resample.resize_images(x, tuple(size))
    mean, deviation = (np.asarray(s) for s in self.family.statistics)
    shift, scale = 2 * mean - 1, 2 * deviation
    x = (x - shift.astype(x.dtype)[None, None, None]) / scale.astype(x.dtype)[
      None, None, None
    ]
    output = self.vit.apply({'params': params}, x)
    return contract.Features(output.patches, output.summary)

  def init(self, key: Any) -> PyTree:
    """Random parameters; traceable, so that shapes cost nothing."""
    rows, columns = (count * self.vit.patch_size for count in self.vit.grid)
    image = jnp.zeros((1, rows, columns, 3))
    params = dict(self.vit.init(key, image)['params'])
    return _with_gains(params) if self.vit.layer_scale else params

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> PyTree:
    """Parameters from a published state dict; WeightsError if it differs."""
    prefix, side = self.family.prefix, self.family.grid
    kept = {n: array for n, array in arrays.items() if n.startswith(prefix)}
    # Most families are published in both ways.
    is_timm = vit_weights.is_timm(arrays)
    return vit_weights.read(
      kept or arrays,
      self.vit,
      'timm' if is_timm else self.family.layout,
      source,
      grid=(side, side),
      patch_size=self.family.patch_size,
      antialias=self.family.antialias,
    )


def _with_gains(params: PyTree) -> PyTree:
  """Random networks whose blocks count: trained gains are far from 1e-5."""

  def grow(path, leaf):
    is_gain = path[-1].key in ('scale1', 'scale2')
    return jnp.full_like(leaf, 0.3) if is_gain else leaf

  return jax.tree_util.tree_map_with_path(grow, params)


def build(
  name: str,
  grid: int = 16,
  patch_size: int = 0,
  dtype: str = 'float32',
) -> VisionTransformer:
  """A transformer without its weights.

  Args:
    name: one of VARIANTS.
    grid: rows (and columns) of patches that it returns.
    patch_size: 0 for the one that is usual for teachers: 16 for DINOv2 (14 in
      the files), else that of its training. The patch embedding is resampled,
      see `resample`.
    dtype: of the computation.
  """
  contract.check_options(name, dtype=dtype, grid=grid)
  contract.check_options(name, least=0, patch_size=patch_size)
  variant = VARIANTS[name]
  family = variant.family
  network = vit.Vit(
    (grid, grid),
    patch_size or family.used_patch_size or family.patch_size,
    variant.width,
    variant.depth,
    variant.heads,
    4 * variant.width,
    dtype=dtype,
    **family.fields,
  )
  return VisionTransformer(name, network, family, variant.published)
