"""The tokenizer: encode to global tokens, bootstrap local ones, decode.

Below the module stand the groups of its parameters: what is trained, what
stays, what is loaded for use.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors
from selfboottok_jax.models import aligners, decoder, encoder, layers
from selfboottok_jax.models import quantizers as quantizers_lib

# In the order in which they are fused, and dropped from the right.
GROUPS = ('global', 'local1d', 'local2d')
# Begins the names of heads that carry tokens to a teacher's width. Their
# parameters lie beside the tokenizer's, but serve the loss alone.
PROJECTOR = 'project_'
CHOICES = {
  'attention': layers.ATTENTIONS,
  'dtype': layers.DTYPES,
  'assignment': tuple(quantizers_lib.ASSIGNMENTS),
  'bootstrap_from': ('continuous', 'quantized'),
  'cross_attend': ('locals', 'all'),
  'fusion': decoder.FUSIONS,
}


@flax.struct.dataclass
class TokenizerOutput:
  """One training pass.

  Attributes:
    reconstruction: pixels [b, h, w, 3], around [-1, 1].
    codes: the result of `encode`, [b, k, e].
    tokens: each group's tokens before quantisation, [b, k, e]. In the quantized
      mode the local ones were predicted from quantised tokens.
    quantized: each group's quantised tokens, and how they were assigned.
  """

  reconstruction: Float[Array, 'b h w 3']
  codes: Float[Array, 'b k e']
  tokens: dict[str, Float[Array, 'b k e']]
  quantized: dict[str, quantizers_lib.Quantized]


class Tokenizer(nn.Module):
  """SelfBootTok (Sec. 3), and with both aligners off SoftVQ-VAE.

  Attributes:
    image_size: side of the square images, a multiple of `patch_size`.
    num_tokens: global tokens per image, a multiple of `num_codebooks`.
    token_dim: numbers per token.
    head_dim: width of an attention head, in every transformer here.
    layer_scale: initial gain of residual branches; 0 is without.
    quantizer_chunk: tokens of a codebook whose logits are in memory at a time;
      0 for all. It changes no value.
    unit_rms: scale each global token to unit RMS before anything reads it. The
      cosine assignment is blind to the norm, which would else drift. Turn it
      off with 'l2', whose distances need the norm.
    local1d_width: hidden width of the local 1D MLP; 0 leaves the group out.
    local2d_width: width of the local 2D transformer.
    local2d_depth: its depth; 0 leaves the group out.
    causal: whether local 2D queries see only earlier ones (Table 3, "C").
    share_codebooks: local groups use the global codebooks (Table 3, "CB off").
    fusion: 'residual' or 'concat', Eq. (11).
    cross_attend: what the decoder's cross-attention reads besides the local
      groups: nothing ('locals'), or the fused tokens too ('all').
    bootstrap_from: the tensor that `encode` returns, that the aligners read and
      that a generator models. 'continuous' is z_G, quantised once at decoding;
      'quantized' is q_G, which is never quantised again.
    group_dropout: probability that a training image loses its last one or two
      local groups, so that one model decodes every prefix of the groups.
  """

  image_size: int
  patch_size: int = 16
  num_tokens: int = 64
  token_dim: int = 32
  encoder_width: int = 768
  encoder_depth: int = 12
  decoder_width: int = 768
  decoder_depth: int = 12
  head_dim: int = 64
  mlp_ratio: float = 4.0
  layer_scale: float = 0.0
  codebook_size: int = 8192
  num_codebooks: int = 4
  assignment: str = 'cosine'
  tau: float = 0.07
  quantizer_chunk: int = 0
  unit_rms: bool = True
  local1d_width: int = 1024
  local2d_width: int = 384
  local2d_depth: int = 6
  causal: bool = True
  share_codebooks: bool = False
  fusion: str = 'residual'
  cross_attend: str = 'locals'
  bootstrap_from: str = 'continuous'
  group_dropout: float = 0.0
  attention: str = 'xla'
  remat: bool = False
  unroll: int = 1
  dtype: str = 'float32'

  def setup(self):
    self.check()
    common = {
      'attention': self.attention,
      'remat': self.remat,
      'unroll': self.unroll,
      'dtype': self.dtype,
    }
    vit = {'mlp_ratio': self.mlp_ratio, 'layer_scale': self.layer_scale}
    self.encoder = encoder.Encoder(
      self.patch_size,
      self.num_tokens,
      self.token_dim,
      self.encoder_width,
      self.encoder_depth,
      self.encoder_width // self.head_dim,
      **vit,
      **common,
    )
    self.decoder = decoder.Decoder(
      self.image_size,
      self.patch_size,
      self.decoder_width,
      self.decoder_depth,
      self.decoder_width // self.head_dim,
      **vit,
      **common,
    )
    self.fuse = decoder.Fusion(self.fusion)
    self.quantizer_global = self._quantizer()
    if 'local1d' in self.groups:
      self.local1d = aligners.Projector(
        self.token_dim, self.local1d_width, self.dtype
      )
      if not self.share_codebooks:
        self.quantizer_local1d = self._quantizer()
    if 'local2d' in self.groups:
      self.local2d = aligners.Local2D(
        self.local2d_width,
        self.local2d_depth,
        self.local2d_width // self.head_dim,
        self.causal,
        **common,
      )
      if not self.share_codebooks:
        self.quantizer_local2d = self._quantizer()

  @property
  def groups(self) -> tuple[str, ...]:
    """The token groups that this model has, in the order of GROUPS."""
    present = {
      'global': True,
      'local1d': self.local1d_width > 0,
      'local2d': self.local2d_depth > 0,
    }
    return tuple(group for group in GROUPS if present[group])

  def check(self) -> None:
    """Raises ConfigError for fields out of range or not fitting together."""
    for name, choices in CHOICES.items():
      errors.require_choice(f'model.{name}', getattr(self, name), choices)
    multiples = [
      ('data.image_size', self.image_size, 'model.patch_size'),
      ('model.num_tokens', self.num_tokens, 'model.num_codebooks'),
      ('model.encoder_width', self.encoder_width, 'model.head_dim'),
      ('model.decoder_width', self.decoder_width, 'model.head_dim'),
      ('model.local2d_width', self.local2d_width, 'model.head_dim'),
    ]
    for name, value, divisor_name in multiples:
      divisor = getattr(self, divisor_name.removeprefix('model.'))
      if divisor < 1 or value < 1 or value % divisor:
        raise errors.ConfigError(
          f'{name}={value} does not divide by {divisor_name}={divisor}; '
          'change one of the two'
        )
    tokens, chunk = self.num_tokens // self.num_codebooks, self.quantizer_chunk
    chunk_fits = chunk == 0 or (chunk > 0 and tokens % chunk == 0)
    divisor = f'0, or a divisor of the {tokens} tokens of each codebook'
    fours = 'a multiple of 4, for the 2D position tables'
    for name, fits, wanted in (
      ('encoder_width', self.encoder_width % 4 == 0, fours),
      ('decoder_width', self.decoder_width % 4 == 0, fours),
      ('encoder_depth', self.encoder_depth >= 1, '1 or more'),
      ('decoder_depth', self.decoder_depth >= 1, '1 or more'),
      ('local1d_width', self.local1d_width >= 0, '0 or more'),
      ('local2d_depth', self.local2d_depth >= 0, '0 or more'),
      ('token_dim', self.token_dim >= 1, '1 or more'),
      ('codebook_size', self.codebook_size >= 1, '1 or more'),
      ('unroll', self.unroll >= 1, '1 or more'),
      ('quantizer_chunk', chunk_fits, divisor),
      ('mlp_ratio', self.mlp_ratio > 0, 'a number above 0'),
      ('tau', self.tau > 0, 'a number above 0'),
      ('group_dropout', 0 <= self.group_dropout <= 1, 'a number from 0 to 1'),
    ):
      errors.require(fits, f'model.{name}', getattr(self, name), wanted)

  def __call__(
    self, images: Float[Array, 'b h w 3'], *, train: bool = False
  ) -> TokenizerOutput:
    """Encodes and decodes; `train` needs an rng 'groups' for group dropout."""
    tokens = self._global_tokens(images)
    quantized = {'global': self.quantizer_global(tokens)}
    if self.bootstrap_from == 'quantized':
      codes = quantized['global'].codes
    else:
      codes = tokens
    groups = {'global': tokens, **self.bootstrap(codes)}
    for group in self.groups[1:]:
      quantized[group] = self._quantizer_of(group)(groups[group])
    keep = self._dropped(images.shape[0]) if train else None
    reconstruction = self._render(
      {group: quantized[group].codes for group in self.groups}, keep
    )
    return TokenizerOutput(reconstruction, codes, groups, quantized)

  def encode(self, images: Float[Array, 'b h w 3']) -> Float[Array, 'b k e']:
    """Images in [-1, 1] to the tensor that a generator models."""
    tokens = self._global_tokens(images)
    if self.bootstrap_from == 'quantized':
      return self.quantizer_global(tokens).codes
    return tokens

  def bootstrap(
    self, codes: Float[Array, 'b k e']
  ) -> dict[str, Float[Array, 'b k e']]:
    """Predicts the local groups from the global codes, Eq. (8) and (9)."""
    return {group: getattr(self, group)(codes) for group in self.groups[1:]}

  def decode(
    self, codes: Float[Array, 'b k e'], *, num_groups: int | None = None
  ) -> Float[Array, 'b h w 3']:
    """Codes to pixels around [-1, 1].

    `num_groups` decodes from the first so many of `groups` only; the result is
    meaningful for a model that was trained with `group_dropout`.
    """
    if self.bootstrap_from == 'quantized':
      quantized = {'global': codes}
    else:
      quantized = {'global': self.quantizer_global(codes).codes}
    for group, tokens in self.bootstrap(codes).items():
      quantized[group] = self._quantizer_of(group)(tokens).codes
    keep = None
    if num_groups is not None:
      kept = jnp.arange(1, len(self.groups)) < num_groups
      keep = jnp.broadcast_to(kept[None], (codes.shape[0], kept.size))
      keep = keep.astype(jnp.float32)
    return self._render(quantized, keep)

  def _quantizer(self):
    return quantizers_lib.SoftVQ(
      self.codebook_size,
      self.num_codebooks,
      self.assignment,
      self.tau,
      self.quantizer_chunk,
    )

  def _quantizer_of(self, group):
    return getattr(
      self, f'quantizer_{"global" if self.share_codebooks else group}'
    )

  def _global_tokens(self, images):
    tokens = self.encoder(images)
    return layers.unit_rms(tokens) if self.unit_rms else tokens

  def _dropped(self, batch):
    """Which local groups each image keeps: [b, groups - 1] of 0 and 1."""
    num_locals = len(self.groups) - 1
    if not self.group_dropout or not num_locals:
      return None
    drop_key, count_key = jax.random.split(self.make_rng('groups'))
    drops = jax.random.bernoulli(drop_key, self.group_dropout, (batch,))
    count = jax.random.randint(count_key, (batch,), 0, num_locals)
    count = jnp.where(drops, count, num_locals)
    return (jnp.arange(num_locals)[None] < count[:, None]).astype(jnp.float32)

  def _render(self, quantized, keep):
    """Fuses and decodes; a group that is not kept becomes the global one.

    Its weight in the sum thereby goes to the global tokens, and its
    cross-attention is switched off.
    """
    first = quantized['global']
    if keep is None:
      keep = jnp.ones((first.shape[0], len(self.groups) - 1))
    codes, contexts, kept = [first], [], []
    for i, group in enumerate(self.groups[1:]):
      mask = keep[:, i]
      chosen = jnp.where(mask[:, None, None] > 0, quantized[group], first)
      codes.append(chosen)
      contexts.append(quantized[group])
      kept.append(mask)
    fused = self.fuse(codes)
    if self.cross_attend == 'all':
      contexts.append(fused)
      kept.append(jnp.ones_like(keep[:, 0]) if kept else jnp.ones(len(first)))
    return self.decoder(fused, contexts, kept)


def model_params(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """The tokenizer's own parameters, without the heads to the teachers."""
  return {k: v for k, v in params.items() if not k.startswith(PROJECTOR)}


def split_trainable(
  params: Mapping[str, PyTree], trainable: tuple[str, ...]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Cuts a tokenizer's parameters into (trained, base) by module name."""
  unknown = sorted(set(trainable) - set(params))
  if unknown or not trainable:
    raise errors.ConfigError(
      f'trainable={",".join(trainable) or "()"}; the model has no '
      f'{", ".join(unknown) or "empty choice"}; wanted some of '
      f'{", ".join(sorted(params))}'
    )
  trained = {k: v for k, v in params.items() if k in trainable}
  base = {k: v for k, v in params.items() if k not in trainable}
  return trained, base


def served_params(
  params: Mapping[str, Any], ema: Mapping[str, Any]
) -> dict[str, PyTree]:
  """Parameters to load for use: running means, and what was never trained."""
  return model_params({**params.get('base', {}), **ema['tokenizer']})


def encoding_params(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """The parameters of the modules that `Tokenizer.encode` reads."""
  return {k: params[k] for k in ('encoder', 'quantizer_global')}
