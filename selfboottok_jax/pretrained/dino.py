"""A frozen DINO transformer under the discriminator's heads.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers",
2021. The same weights as in `dino_deitsmall16_pretrain.pth` of
https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from selfboottok_jax.pretrained import contract, resample, vit

# Mean and deviation of ImageNet photographs on the scale of [-1, 1].
_SHIFT = 2 * np.array([0.485, 0.456, 0.406]) - 1
_SCALE = 2 * np.array([0.229, 0.224, 0.225])


@flax.struct.dataclass
class View:
  """The way in which images larger than the transformer's are brought to it.

  Attributes:
    crop: Bool[Array, ''], True to cut, False to average.
    row: Int[Array, ''], the first row of the cut.
    column: Int[Array, ''], the first column of the cut.
  """

  # Any: a pytree also carries batches of these, under vmap.
  crop: Any
  row: Any
  column: Any


@dataclasses.dataclass(frozen=True, eq=False)
class DinoTrunk:
  """Activations of a frozen transformer, differentiable in the images.

  Attributes:
    name: one of TRUNKS.
    vit: the transformer; its taps are what the heads read.
    published: where its weights are; None where nobody publishes any.
    params: those of `vit`, float32; None until they are loaded.
  """

  name: str
  vit: vit.Vit
  published: contract.Published | None
  params: Any = None

  @property
  def shape_key(self) -> dict[str, Any]:
    """Returns the settings that change the parameters made of a file."""
    return {'taps': self.vit.taps}

  @property
  def side(self) -> int:
    """Rows (and columns) of pixels that the transformer takes."""
    return self.vit.grid[0] * self.vit.patch_size

  def draw(self, key: Any, size: tuple[int, int]) -> View:
    """A view of images of `size` rows and columns: cut or averaged, evenly."""
    coin, *places = jax.random.split(key, 3)
    row, column = (
      jax.random.randint(place, (), 0, max(length - self.side, 0) + 1)
      for place, length in zip(places, size, strict=True)
    )
    return View(jax.random.bernoulli(coin), row, column)

  def __call__(
    self, params: PyTree, images: Float[Array, 'b h w 3'], view: View
  ) -> list[Float[Array, 'b n d']]:
    """Activations at each tap for images in [-1, 1], as float32.

    A patch's vector is its own plus the class token's. The transformer takes
    squares of one size, whatever the images are. A side as long as its own or
    longer is seen as `view` says, in the same way in all images; a shorter one
    is enlarged, bicubic and without antialiasing.
    """
    x = self.fit(images, view)
    shift, scale = (
      s.astype(x.dtype)[None, None, None] for s in (_SHIFT, _SCALE)
    )
    output: Any = self.vit.apply({'params': params}, (x - shift) / scale)
    taps = [output.hidden[tap] for tap in self.vit.taps]
    return [tokens[:, 1:] + tokens[:, :1] for tokens in taps]

  def fit(
    self, images: Float[Array, 'b h w 3'], view: View
  ) -> Float[Array, 'b s s 3']:
    """Images of the transformer's size."""
    x = images.astype(jnp.promote_types(images.dtype, jnp.float32))
    size = x.shape[1:3]
    if size == (self.side, self.side):
      return x
    for axis, first in enumerate((view.row, view.column)):
      old = size[axis]
      if old >= self.side:
        # Cutting is a matrix too: one program for both, without a branch.
        cut = jnp.arange(old)[None] == first + jnp.arange(self.side)[:, None]
        average = jnp.asarray(area_matrix(old, self.side), x.dtype)
        matrix = jnp.where(view.crop, cut.astype(x.dtype), average)
      else:
        resize = resample.resize_matrix(old, self.side, antialias=False)
        matrix = jnp.asarray(resize, x.dtype)
      spec = ('ij,bjwc->biwc', 'ij,bhjc->bhic')[axis]
      x = jnp.einsum(spec, matrix, x, precision=jax.lax.Precision.HIGHEST)
    return x

  def init(self, key: Any) -> PyTree:
    """Random parameters; traceable, so that shapes cost nothing."""
    image = jnp.zeros((1, self.side, self.side, 3))
    return dict(self.vit.init(key, image)['params'])

  def examples(self) -> list[Float[Array, 'b n d']]:
    """Activations of one image, all 0, to initialise heads on."""
    rows, columns = self.vit.grid
    shape = (1, rows * columns, self.vit.width)
    return [jnp.zeros(shape) for _ in self.vit.taps]

  def read(self, arrays: Mapping[str, np.ndarray], source: str) -> PyTree:
    """Parameters from a published state dict.

    Raises:
      WeightsError: names or shapes are not this network's.
    """
    return vit.read(arrays, self.vit, vit.NAMINGS['timm'], source)


def area_matrix(old: int, new: int) -> Float[np.ndarray, 'new old']:
  """Means over the pixels that a new pixel touches, each with equal weight.

  Exact where `new` divides `old`; else pixels at the edge of two count in both.
  """
  matrix = np.zeros((new, old))
  for i in range(new):
    first, last = i * old // new, -(-(i + 1) * old // new)
    matrix[i, first:last] = 1 / (last - first)
  return matrix


@dataclasses.dataclass(frozen=True)
class TrunkSpec:
  """Fields of `vit.Vit`, and the place of its weights."""

  grid: tuple[int, int]
  patch_size: int
  width: int
  depth: int
  heads: int
  taps: tuple[int, ...]
  published: contract.Published | None = None


TRUNKS: dict[str, TrunkSpec] = {
  'dino_s16': TrunkSpec(
    *((14, 14), 16, 384, 12, 6, (0, 3, 6, 9, 12)),
    contract.Published(
      'timm/vit_small_patch16_224.dino',
      ('model.safetensors',),
      'Apache-2.0',
      21.7,
      'discriminator',
    ),
  ),
  # Nobody publishes it: it runs every code path on a small machine.
  'dino_tiny': TrunkSpec((4, 4), 8, 48, 4, 3, (0, 1, 2, 3, 4)),
}


def build(
  name: str, dtype: str = 'float32', attention: str = 'auto'
) -> DinoTrunk:
  """A trunk without its weights.

  Args:
    name: one of TRUNKS.
    dtype: floating-point type of the computation.
    attention: implementation, see `layers.Attention`.
  """
  contract.check_options(name, dtype=dtype, attention=attention)
  spec = TRUNKS[name]
  network = vit.Vit(
    spec.grid,
    spec.patch_size,
    spec.width,
    spec.depth,
    spec.heads,
    4 * spec.width,
    taps=spec.taps,
    # The tanh approximation: StyleGAN-T's heads were trained on it.
    gelu='tanh',
    attention=attention,
    dtype=dtype,
  )
  return DinoTrunk(name, network, spec.published)
