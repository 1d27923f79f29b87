"""Fusion of the token groups, and the decoder from tokens to pixels."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from selfboottok_jax.models import layers, transformer

FUSIONS = ('residual', 'concat')


class Fusion(nn.Module):
  """Eq. (11): a weighted sum of the groups, or their concatenation.

  The sum's weights are learned scalars that add up to 1: all but the last
  group's are parameters, which start at (1, 0, ...), so that a fresh model is
  its global tokens alone.
  """

  mode: str = 'residual'

  @nn.compact
  def __call__(
    self, groups: Sequence[Float[Array, 'b k e']]
  ) -> Float[Array, 'b m e']:
    if self.mode == 'concat':
      return jnp.concatenate(list(groups), axis=1)
    if len(groups) == 1:
      return groups[0]
    start = [1.0] + [0.0] * (len(groups) - 2)
    weights = self.param('weights', lambda _: jnp.asarray(start))
    weights = jnp.append(weights, 1 - jnp.sum(weights))
    return jnp.einsum('g,gbke->bke', weights, jnp.stack(list(groups)))


class DecoderBlock(nn.Module):
  """Self-attention, gated cross-attention to each context, MLP.

  Gates are scalars that start at 0: a fresh block is a plain ViT block.
  """

  heads: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.0
  attention: str = 'xla'
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b k d'],
    contexts: tuple[Float[Array, 'b _ d'], ...] = (),
    keep: tuple[Float[Array, ' b'], ...] = (),
  ) -> Float[Array, 'b k d']:
    for i, (context, kept) in enumerate(zip(contexts, keep, strict=True)):
      attend = layers.Attention(
        self.heads,
        implementation=self.attention,
        dtype=self.dtype,
        name=f'cross{i}',
      )
      gate = self.param(f'gate{i}', nn.initializers.zeros, ())
      branch = attend(
        layers.layer_norm(self.dtype, name=f'cross_norm{i}')(x), context
      )
      x = x + branch * (gate * kept).astype(self.dtype)[:, None, None]
    return transformer.Block(
      self.heads,
      self.mlp_ratio,
      self.layer_scale,
      self.attention,
      self.dtype,
      name='vit',
    )(x)


class Decoder(nn.Module):
  """Eq. (10): [cls | mask tokens] ++ [fused tokens] -> pixels in [-1, 1].

  Local groups enter a second time, by gated cross-attention in every block,
  each through its own projection. The output is linear and may overshoot.
  """

  image_size: int
  patch_size: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.0
  attention: str = 'xla'
  remat: bool = False
  unroll: int = 1
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    fused: Float[Array, 'b m e'],
    contexts: Sequence[Float[Array, 'b _ e']] = (),
    keep: Sequence[Float[Array, ' b']] = (),
  ) -> Float[Array, 'b h w 3']:
    b, m, _ = fused.shape
    side = self.image_size // self.patch_size
    normal = nn.initializers.normal(0.02)
    mask_token = self.param('mask_token', normal, (1, 1, self.width))
    patches = mask_token + layers.position_table(
      self, 'patch_positions', layers.sincos_2d(side, self.width)
    )
    cls = self.param('cls', normal, (1, 1, self.width))
    start = jnp.concatenate([cls, patches], axis=1).astype(self.dtype)
    # Codes lie in the unit ball. Unit weights bring them to the size of the
    # position tables; Xavier's would leave them a tenth of it, unheard.
    embed = functools.partial(
      nn.Dense,
      self.width,
      dtype=self.dtype,
      kernel_init=nn.initializers.normal(1.0),
    )
    token_positions = self.param('token_positions', normal, (1, m, self.width))
    tokens = embed(name='from_code')(fused) + token_positions.astype(self.dtype)
    x = jnp.concatenate(
      [jnp.broadcast_to(start, (b, *start.shape[1:])), tokens], axis=1
    )
    projected = tuple(
      embed(name=f'context{i}')(context) for i, context in enumerate(contexts)
    )
    block = functools.partial(
      DecoderBlock,
      self.heads,
      self.mlp_ratio,
      self.layer_scale,
      self.attention,
      self.dtype,
    )
    x = transformer.Stack(
      block, self.depth, self.remat, self.unroll, name='blocks'
    )(x, projected, tuple(keep))
    x = layers.layer_norm(self.dtype, name='norm')(x[:, 1 : 1 + side**2])
    # For whoever asks: the adaptive weight of the adversarial term does.
    self.sow('intermediates', 'features', x)
    pixels = layers.dense(self.patch_size**2 * 3, 'float32', name='to_pixels')(
      x
    )
    return layers.unpatchify(pixels, self.patch_size)
