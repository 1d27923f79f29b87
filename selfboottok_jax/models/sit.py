"""SiT: the transformer that predicts the velocity of noisy tokens.

With a class token it is REG (Wu et al., 2025): a frozen encoder's class vector
is noised and denoised together with the tokens. With a projector it offers what
REPA (Yu et al., 2024) aligns with a frozen encoder: the tokens after some
blocks, projected to the width of that encoder's patches.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from selfboottok_jax import errors
from selfboottok_jax.models import aligners, layers, transformer

# Sinusoidal features of a time; part of the shapes in released checkpoints.
_TIME_FEATURES = 256
# Partial: SiT's 'gelu' is the tanh approximation, unlike the default of `Mlp`.
MLPS: dict[str, Callable[..., nn.Module]] = {
  'gelu': functools.partial(layers.Mlp, gelu='tanh'),
  'swiglu': layers.SwiGlu,
}
NORMS = ('layer', 'rms')
CHOICES = {
  'attention': layers.ATTENTIONS,
  'dtype': layers.DTYPES,
  'mlp': tuple(MLPS),
  'norm': NORMS,
  'residual_dtype': layers.RESIDUAL_DTYPES,
}


@flax.struct.dataclass
class SiTOutput:
  """The network's predictions for noisy tokens, in float32.

  Attributes:
    tokens: velocity of the tokens [b, k, e].
    cls: velocity of the class token [b, c]; None without one.
    aligned: hidden tokens at the width of the teacher's patches [b, k, a]; None
      outside of training, or without alignment.
    aligned_cls: hidden class token at the width of the teacher's class vector
      [b, c]; None as `aligned`, or without a class token.
  """

  tokens: Float[Array, 'b k e']
  cls: Float[Array, 'b c'] | None = None
  aligned: Float[Array, 'b k a'] | None = None
  aligned_cls: Float[Array, 'b c'] | None = None


class Modulated(nn.Module):
  """A block whose norms are shifted, scaled and gated by a condition.

  The modulation starts at zero (adaLN-zero), so the block starts as identity.
  Fields are those of `SiT`.
  """

  heads: int
  mlp_ratio: float = 4.0
  norm: str = 'layer'
  mlp: str = 'gelu'
  qk_norm: bool = False
  shift: bool = True
  attention: str = 'auto'
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b k d'],
    condition: Float[Array, 'b d'],
    angles: Float[Array, 'k _'] | None = None,
  ) -> Float[Array, 'b k d']:
    shift1, scale1, gate1, shift2, scale2, gate2 = self._modulation(condition)
    attend = layers.Attention(
      self.heads,
      self.norm if self.qk_norm else '',
      self.attention,
      self.dtype,
      name='attn',
    )
    mlp = MLPS[self.mlp](self.mlp_ratio, dtype=self.dtype, name='mlp')
    norm = functools.partial(_norm, self.norm, self.dtype)
    # One gate per image and channel, for all tokens alike.
    h = layers.modulate(norm('norm1')(x), shift1, scale1)
    x = x + gate1[:, None] * attend(h, angles=angles)
    h = layers.modulate(norm('norm2')(x), shift2, scale2)
    return x + gate2[:, None] * mlp(h)

  def _modulation(
    self, condition: Float[Array, 'b d']
  ) -> Sequence[Float[Array, 'b d']]:
    """Returns shift, scale and gate of the attention, then of the MLP."""
    if self.shift:
      return _modulation(condition, 6, self.dtype)
    scale1, gate1, scale2, gate2 = _modulation(condition, 4, self.dtype)
    # Constant zeros, which XLA folds away: no parameters stand behind them.
    zero = jnp.zeros_like(gate1)
    return zero, scale1, gate1, zero, scale2, gate2


class SiT(nn.Module):
  """Predicts the velocity of noisy tokens at time t for class labels.

  Times run from 0 (data) to 1 (noise). Labels are in [0, num_classes];
  `num_classes` itself is the null label of classifier-free guidance. The last
  layers start at zero, hence so do the velocities.

  Attributes:
    num_tokens: tokens per image (k).
    token_dim: numbers per token (e).
    num_classes: classes, the null label not counted.
    width: width of the transformer (d); 384, 768, 1024 and 1152 in the S, B, L
      and XL of the paper.
    depth: number of blocks.
    heads: attention heads, a divisor of `width`.
    mlp_ratio: hidden width of the MLPs over d.
    cls_dim: width of the class token (c); 0 for a model without one.
    align_dim: width of a teacher's patches (a); 0 for no alignment.
    align_depth: blocks after which tokens are aligned.
    projector_width: hidden width of the MLP from d to a teacher's width.
    positions: fixed sin-cos table of a sequence ('1d'), of a square grid in
      raster order ('2d'), or of one of so many rows and columns ('16x24'). The
      class token has no position.
    norm: 'layer' without parameters, or 'rms' with a gain; also of `qk_norm`.
    mlp: 'gelu' (tanh), or 'swiglu', at a width that gives it as many
      parameters.
    qk_norm: apply an affine norm to the queries and keys of each head.
    rope: turn queries and keys by their positions too, but not those of the
      class token.
    shift: let the modulation shift, besides scaling and gating.
    label_dropout: rate at which training replaces labels by the null label.
    dtype: of the blocks' computation; parameters, time features and the
      velocity are float32.
    remat: what the backward pass computes again: 'none', 'dots' (all but the
      products with weights) or 'block', see `transformer.REMATS`.
    unroll: blocks per iteration of the compiled loop, see `transformer.Stack`.
    residual_dtype: type in which blocks add up their results: 'float32', or ''
      for `dtype`.
    attention: implementation, see `layers.Attention`.
  """

  num_tokens: int
  token_dim: int
  num_classes: int
  width: int
  depth: int
  heads: int
  mlp_ratio: float = 4.0
  cls_dim: int = 0
  align_dim: int = 0
  align_depth: int = 8
  projector_width: int = 2048
  positions: str = '1d'
  norm: str = 'layer'
  mlp: str = 'gelu'
  qk_norm: bool = False
  rope: bool = False
  shift: bool = True
  label_dropout: float = 0.1
  dtype: str = 'float32'
  remat: str | bool = 'none'
  unroll: int = 0
  residual_dtype: str = ''
  attention: str = 'auto'

  def check(self) -> None:
    """Checks the fields alone and against each other.

    Raises:
      ConfigError: a field is out of range, or two do not fit together.
    """
    for name, choices in CHOICES.items():
      errors.require_choice(f'model.{name}', getattr(self, name), choices)
    remat = transformer.remat_of(self.remat)
    errors.require_choice('model.remat', remat, transformer.REMATS)
    for name in (
      *('num_tokens', 'token_dim', 'num_classes'),
      *('width', 'depth', 'heads', 'align_depth', 'projector_width'),
    ):
      value = getattr(self, name)
      errors.require(value >= 1, f'model.{name}', value, '1 or more')
    ratio, rate = self.mlp_ratio, self.label_dropout
    errors.require(ratio > 0, 'model.mlp_ratio', ratio, 'a number above 0')
    errors.require(self.unroll >= 0, 'model.unroll', self.unroll, '0 or more')
    share = 'a number from 0 to 1'
    errors.require(0 <= rate <= 1, 'model.label_dropout', rate, share)
    if self.align_dim:
      wanted = f'1 to model.depth={self.depth}'
      fits = self.align_depth <= self.depth
      errors.require(fits, 'model.align_depth', self.align_depth, wanted)
    self._check_positions()
    self._check_widths()

  def _check_positions(self) -> None:
    """Checks that the tokens fill the grid of their positions.

    Raises:
      ConfigError: they do not, or `positions` is none of what it may be.
    """
    count, kind = self.num_tokens, self.positions
    if kind == '1d':
      return
    if kind == '2d':
      is_square = math.isqrt(count) ** 2 == count
      errors.require(is_square, 'model.num_tokens', count, 'a square number')
      return
    wanted = f"'1d', '2d', or as '16x24' a grid of {count} tokens"
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', kind)
    fits = bool(match) and math.prod(self.grid) == count
    errors.require(fits, 'model.positions', kind, wanted)

  @property
  def grid(self) -> tuple[int, ...]:
    """Rows and columns of the tokens, or their number in a sequence."""
    if self.positions == '1d':
      return (self.num_tokens,)
    if self.positions == '2d':
      return layers.square_grid(self.num_tokens)
    return tuple(int(side) for side in self.positions.split('x'))

  def _check_widths(self) -> None:
    """Checks that heads and positions divide the width evenly.

    Raises:
      ConfigError: they do not.
    """
    width, heads = f'model.width={self.width}', f'model.heads={self.heads}'
    if self.width % self.heads:
      raise errors.ConfigError(
        f'{width} does not divide by {heads}; change one of the two'
      )
    # A rotation turns pairs of columns; each axis has its share of them.
    parts = 2 if self.positions == '1d' else 4
    head_width = self.width // self.heads
    if self.rope and head_width % parts:
      raise errors.ConfigError(
        f'model.rope=True with heads of {head_width} ({width}, {heads}); '
        f'wanted heads of a multiple of {parts}'
      )
    if self.positions != '1d':
      wanted = 'a multiple of 4, for the 2D positions'
      errors.require(self.width % 4 == 0, 'model.width', self.width, wanted)

  @property
  def segments(self) -> list[tuple[int, int]]:
    """The (first block, one past the last) of every stack of parameters."""
    taps = (self.align_depth,) if self.align_dim else ()
    return transformer.segments(self.depth, taps)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b k e'],
    t: Float[Array, ' b'],
    labels: Int[Array, ' b'],
    cls: Float[Array, 'b c'] | None = None,
    *,
    train: bool = False,
  ) -> SiTOutput:
    """Predicts velocities, and in training the tokens to align.

    Args:
      x: noisy tokens.
      t: time of each image, in [0, 1].
      labels: class of each image, or the null label.
      cls: the noisy class token; required if `cls_dim` is not 0.
      train: drop labels with the rng 'dropout', and project what is aligned.

    Raises:
      ConfigError: fields that `check` refuses.
    """
    self.check()
    # Training without some labels gives the unconditional velocity that
    # classifier-free guidance extrapolates from.
    if train:
      labels = self._drop(labels)
    # The last row of the table is the null label's. The sum is float32, because
    # the time's part is.
    condition = self._embed_time(t) + nn.Embed(
      self.num_classes + 1,
      self.width,
      embedding_init=nn.initializers.normal(0.02),
      dtype=self.dtype,
      name='label_table',
    )(labels)
    h = self._embed(x, cls)
    h, hidden = self._blocks(h, condition)
    # The last norm has a shift whatever `self.shift` says, and needs no gate:
    # no residual stream follows it.
    shift, scale = _modulation(condition, 2, self.dtype)
    h = layers.modulate(_norm(self.norm, self.dtype, 'norm')(h), shift, scale)
    # The class token, if any, is in front.
    first = int(self.cls_dim > 0)
    # Samplers add up many velocities; rounding each to bfloat16 would show.
    to_velocity = _zero_dense(self.token_dim, 'float32', 'to_velocity')
    tokens = to_velocity(h[:, first:]).astype(jnp.float32)
    velocity = None
    if self.cls_dim:
      to_velocity = _zero_dense(self.cls_dim, 'float32', 'to_cls_velocity')
      velocity = to_velocity(h[:, 0]).astype(jnp.float32)
    # Sampling has no use for the projectors, but their parameters must exist.
    aligned = self._project(hidden) if train or self.is_initializing() else {}
    return SiTOutput(tokens, velocity, **aligned)

  def _embed(
    self, x: Float[Array, 'b k e'], cls: Float[Array, 'b c'] | None
  ) -> Float[Array, 'b m d']:
    """Embeds [class token, tokens]; m = k + 1 with a class token, else k."""
    h = layers.dense(self.width, self.dtype, name='token_embed')(x)
    h = h.astype(self.residual_dtype or self.dtype)
    h = h + jnp.asarray(self._positions(), h.dtype)[None]
    if not self.cls_dim:
      return h
    token = layers.dense(self.width, self.dtype, name='cls_embed')(cls)
    # A teacher's class vectors have no fixed scale, unlike the tokens.
    token = layers.layer_norm(self.dtype, name='cls_norm')(token)
    return jnp.concatenate([token[:, None], h], axis=1)

  def _positions(self) -> Float[np.ndarray, 'k d']:
    """Returns the fixed position table of the tokens."""
    if self.positions == '1d':
      return layers.sincos_1d(self.num_tokens, self.width)
    rows, columns = self.grid
    return layers.sincos_2d((rows, columns), self.width)

  def _angles(self) -> Float[Array, 'm _'] | None:
    """Returns rotary angles, zero for the class token; None without RoPE."""
    if not self.rope:
      return None
    table = layers.rotary_angles(self.grid, self.width // self.heads)
    # An angle of zero turns nothing, so the class token stays as it is.
    return jnp.pad(table, ((int(self.cls_dim > 0), 0), (0, 0)))

  def _blocks(
    self, h: Float[Array, 'b m d'], condition: Float[Array, 'b d']
  ) -> tuple[Float[Array, 'b m d'], Float[Array, 'b m d'] | None]:
    """Applies all blocks.

    Returns:
      The last hidden state, and the one after `align_depth` blocks; None in its
      place without alignment.
    """
    block = functools.partial(
      Modulated,
      self.heads,
      self.mlp_ratio,
      self.norm,
      self.mlp,
      self.qk_norm,
      self.shift,
      self.attention,
      self.dtype,
    )
    hidden, angles = None, self._angles()
    # A scan does not show its inner states, so one ends at `align_depth`.
    for begin, end in self.segments:
      h = transformer.Stack(
        block,
        end - begin,
        self.remat,
        self.unroll,
        self.dtype,
        name=transformer.segment_name(begin),
      )(h, condition, angles)
      if end == self.align_depth and self.align_dim:
        hidden = h
    return h, hidden

  def _project(
    self, hidden: Float[Array, 'b m d'] | None
  ) -> dict[str, Float[Array, 'b ...']]:
    """Projects hidden tokens to the teacher's widths; {} without alignment."""
    if hidden is None:
      return {}
    project = functools.partial(
      aligners.Projector, width=self.projector_width, dtype=self.dtype
    )
    projector = project(self.align_dim, name='projector')
    if not self.cls_dim:
      return {'aligned': projector(hidden)}
    aligned = {'aligned': projector(hidden[:, 1:])}
    if self.cls_dim != self.align_dim:
      # The teacher's class vector and patches differ in width, so they cannot
      # share a projector.
      projector = project(self.cls_dim, name='cls_projector')
    # A sequence of one token, because the projector takes sequences.
    return {**aligned, 'aligned_cls': projector(hidden[:, :1])[:, 0]}

  def _drop(self, labels: Int[Array, ' b']) -> Int[Array, ' b']:
    """Replaces labels by the null label at the rate `label_dropout`."""
    key = self.make_rng('dropout')
    dropped = jax.random.bernoulli(key, self.label_dropout, labels.shape)
    return jnp.where(dropped, self.num_classes, labels)

  def _embed_time(self, t: Float[Array, ' b']) -> Float[Array, 'b d']:
    """Embeds times by a small MLP on sinusoidal features, in float32."""
    normal = nn.initializers.normal(0.02)
    # bfloat16 cannot distinguish neighbouring times of a 250-step grid, neither
    # in the features nor in the layers that read them.
    features = layers.timestep_features(t.astype(jnp.float32), _TIME_FEATURES)
    dense = functools.partial(
      nn.Dense,
      self.width,
      kernel_init=normal,
      dtype=jnp.float32,
      precision=layers.precision(jnp.float32),
    )
    return dense(name='time1')(nn.silu(dense(name='time0')(features)))


def _zero_dense(features: int, dtype: str, name: str) -> nn.Dense:
  """Returns a linear layer whose output starts at zero."""
  zeros = nn.initializers.zeros_init()
  return nn.Dense(
    features,
    dtype=dtype,
    precision=layers.precision(dtype),
    kernel_init=zeros,
    name=name,
  )


def _norm(kind: str, dtype: str, name: str) -> nn.Module:
  """Returns a norm without a shift; LayerNorm has no gain either.

  The modulation that follows supplies both.
  """
  epsilon = layers.LAYER_NORM_EPSILON
  if kind == 'rms':
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)
  return nn.LayerNorm(
    epsilon=epsilon, use_bias=False, use_scale=False, dtype=dtype, name=name
  )


def _modulation(
  condition: Float[Array, 'b d'], parts: int, dtype: str
) -> list[Float[Array, 'b d']]:
  """Reads `parts` shifts, scales or gates from the condition (adaLN).

  They start at zero. It adds a layer 'modulation' to the module that calls it.
  """
  width = condition.shape[-1]
  out = _zero_dense(parts * width, dtype, 'modulation')(nn.silu(condition))
  return jnp.split(out, parts, axis=-1)
