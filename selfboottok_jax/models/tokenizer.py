"""The tokenizer: encode to global tokens, bootstrap local ones, decode.

The functions below the module select among its parameters: those to train, to
keep fixed, or to load for use.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from selfboottok_jax import errors, sizes
from selfboottok_jax.models import (
  aligners,
  decoder,
  encoder,
  layers,
  transformer,
)
from selfboottok_jax.models import quantizers as quantizers_lib

# Token groups in the order of fusion; group dropout removes them from the end.
GROUPS = ('global', 'local1d', 'local2d')
# Prefix of the names of heads that carry tokens to a teacher's width. Their
# parameters are stored beside the tokenizer's, but only the loss uses them.
PROJECTOR = 'project_'
CHOICES = {
  'attention': layers.ATTENTIONS,
  'dtype': layers.DTYPES,
  'residual_dtype': layers.RESIDUAL_DTYPES,
  'assignment': tuple(quantizers_lib.ASSIGNMENTS),
  'bootstrap_from': ('continuous', 'quantized'),
  'local_input': ('codes', 'quantized'),
  'cross_attend': ('locals', 'all'),
  'fusion': decoder.FUSIONS,
}


@flax.struct.dataclass
class TokenizerOutput:
  """The results of a full forward pass, as the losses need them.

  Attributes:
    reconstruction: pixels [b, h, w, 3], around [-1, 1].
    codes: the result of `encode`, [b, k, e].
    tokens: each group's tokens before quantisation, [b, k, e]. With
      `bootstrap_from='quantized'` the local ones are predicted from quantised
      global tokens.
    quantized: each group's quantised tokens, and how they were assigned.
  """

  reconstruction: Float[Array, 'b h w 3']
  codes: Float[Array, 'b k e']
  tokens: dict[str, Float[Array, 'b k e']]
  quantized: dict[str, quantizers_lib.Quantized]


class Tokenizer(nn.Module):
  """The SelfBootTok tokenizer (Sec. 3); without aligners it is SoftVQ-VAE.

  An image becomes global tokens. From these, aligners predict groups of local
  tokens, so that the global ones are all that a generator needs to model. The
  decoder reads the quantised tokens of all groups.

  Attributes:
    image_size: side of the images, or (height, width); multiples of
      `patch_size`. Codes and parameters belong to one size.
    patch_size: side of a patch in pixels, in the encoder and the decoder.
    num_tokens: global tokens per image, a multiple of `num_codebooks`.
    token_dim: numbers per token.
    encoder_width: width of the encoder, a multiple of 4 and `head_dim`.
    encoder_depth: number of blocks of the encoder.
    decoder_width: width of the decoder, a multiple of 4 and `head_dim`.
    decoder_depth: number of blocks of the decoder.
    head_dim: width of an attention head, in every transformer here.
    mlp_ratio: hidden width of the MLPs in encoder and decoder over theirs.
    layer_scale: initial gain of residual branches; 0 leaves the gains out.
    codebook_size: rows of each codebook.
    num_codebooks: codebooks of each group, for consecutive tokens.
    assignment: 'cosine' or 'l2', see `quantizers.SoftVQ`.
    tau: temperature of the soft assignment.
    quantizer_chunk: tokens of a codebook whose logits are in memory at a time;
      0 for all. It changes no value.
    unit_rms: scale each global token to unit RMS before anything reads it. The
      cosine assignment ignores the norm, which would otherwise drift. Turn it
      off with 'l2', whose distances need the norm.
    local1d_width: hidden width of the local 1D MLP; 0 leaves the group out.
    local2d_width: width of the local 2D transformer.
    local2d_depth: number of its blocks; 0 leaves the group out.
    causal: local 2D queries see only earlier ones (Table 3, "C"), not all.
    share_codebooks: local groups use the global codebooks (Table 3, "CB off").
    fusion: 'residual' or 'concat', Eq. (11).
    cross_attend: what the decoder's cross-attention reads besides the local
      groups: nothing ('locals'), or the fused tokens too ('all').
    bootstrap_from: the tensor that `encode` returns, that the aligners read and
      that a generator models. 'continuous' is z_G, quantised once at decoding;
      'quantized' is q_G, which is never quantised again.
    local_input: what the aligners read: the 'codes' themselves, or 'quantized',
      which is q_G whatever the codes are. Continuous codes would otherwise
      reach the decoder around their codebook, by the local 1D tokens.
    group_dropout: probability that a training image loses its last one or two
      local groups, so that one model decodes every prefix of the groups.
    attention: implementation, see `layers.Attention`.
    remat: what the backward pass computes again, to save memory: 'none', 'dots'
      (all but the products with weights) or 'block', see `transformer.REMATS`.
    unroll: blocks per iteration of the compiled loops, see `transformer.Stack`.
    residual_dtype: type in which blocks add up their results: 'float32', or ''
      for `dtype`.
    dtype: of the blocks' computation; parameters and tokens are float32.
  """

  image_size: sizes.Size
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
  local_input: str = 'codes'
  group_dropout: float = 0.0
  attention: str = 'auto'
  remat: str | bool = 'none'
  unroll: int = 0
  residual_dtype: str = ''
  dtype: str = 'float32'

  def setup(self) -> None:
    # `setup` and not `nn.compact`: encoding, bootstrapping and decoding are
    # separate entry points to the same submodules.
    self.check()
    common: dict[str, Any] = {
      'attention': self.attention,
      'remat': self.remat,
      'unroll': self.unroll,
      'residual_dtype': self.residual_dtype,
      'dtype': self.dtype,
    }
    vit: dict[str, Any] = {
      'mlp_ratio': self.mlp_ratio,
      'layer_scale': self.layer_scale,
    }
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
    # The attribute's name is the group's: `bootstrap` and `_quantizer_of` look
    # both up by it, and checkpoints contain it.
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

  def fusion_scalars(
    self, params: Mapping[str, PyTree]
  ) -> dict[str, Float[Array, '']]:
    """Collects the learned scalars that let local groups into the decoder.

    Args:
      params: of this model, by module.

    Returns:
      'fusion/weight_GROUP': weights of the sum of Eq. (11);
      'fusion/gate_GROUP_N': gate of the cross-attention of decoder block N;
      'fusion/gate_GROUP': root mean square of a group's gates. Where the fused
      tokens are read too, their GROUP is 'fused'.
    """
    scalars = {}
    if (weights := params.get('fuse', {}).get('weights')) is not None:
      last = 1 - jnp.sum(weights)
      for group, weight in zip(self.groups, [*weights, last], strict=True):
        scalars[f'fusion/weight_{group}'] = weight
    gates = params['decoder']['blocks']['block']
    for index, group in enumerate((*self.groups[1:], 'fused')):
      if (of_group := gates.get(f'gate{index}')) is not None:
        square = jnp.mean(jnp.square(of_group))
        scalars[f'fusion/gate_{group}'] = jnp.sqrt(square)
        for block, gate in enumerate(of_group):
          scalars[f'fusion/gate_{group}_{block}'] = gate
    return scalars

  def check(self) -> None:
    """Checks the fields alone and against each other.

    Raises:
      ConfigError: a field is out of range, or two do not fit together.
    """
    for name, choices in CHOICES.items():
      errors.require_choice(f'model.{name}', getattr(self, name), choices)
    remat = transformer.remat_of(self.remat)
    errors.require_choice('model.remat', remat, transformer.REMATS)
    # (name, value, name of a field that must divide it), under the names that a
    # user sets them by.
    multiples: list[tuple[str, sizes.Size, str]] = [
      ('data.image_size', self.image_size, 'model.patch_size'),
      ('model.num_tokens', self.num_tokens, 'model.num_codebooks'),
      ('model.encoder_width', self.encoder_width, 'model.head_dim'),
      ('model.decoder_width', self.decoder_width, 'model.head_dim'),
      ('model.local2d_width', self.local2d_width, 'model.head_dim'),
    ]
    for name, value, divisor_name in multiples:
      divisor = getattr(self, divisor_name.removeprefix('model.'))
      parts = value if isinstance(value, tuple) else (value,)
      # Values below 1 are refused too: 0 divides by everything.
      if divisor < 1 or any(part < 1 or part % divisor for part in parts):
        raise errors.ConfigError(
          f'{name}={value} does not divide by {divisor_name}={divisor}; '
          'change one of the two'
        )
    if self.assignment == 'l2' and self.unit_rms:
      raise errors.ConfigError(
        'model.assignment=l2 with model.unit_rms=True: distances need the norm '
        'of a token, which unit RMS takes away; set --config.model.unit_rms='
        'False, or model.assignment=cosine'
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
      ('unroll', self.unroll >= 0, '0 or more'),
      ('quantizer_chunk', chunk_fits, divisor),
      ('mlp_ratio', self.mlp_ratio > 0, 'a number above 0'),
      ('tau', self.tau > 0, 'a number above 0'),
      ('group_dropout', 0 <= self.group_dropout <= 1, 'a number from 0 to 1'),
    ):
      errors.require(fits, f'model.{name}', getattr(self, name), wanted)

  def __call__(
    self, images: Float[Array, 'b h w 3'], *, train: bool = False
  ) -> TokenizerOutput:
    """Encodes and decodes images in [-1, 1].

    Args:
      images: the images.
      train: apply group dropout, which needs the rng 'groups'.
    """
    codes, groups, quantized = self.tokenize(images)
    keep = self._draw_kept(images.shape[0]) if train else None
    reconstruction = self._render(
      {group: quantized[group].codes for group in self.groups}, keep
    )
    return TokenizerOutput(reconstruction, codes, groups, quantized)

  def tokenize(
    self, images: Float[Array, 'b h w 3']
  ) -> tuple[
    Float[Array, 'b k e'],
    dict[str, Float[Array, 'b k e']],
    dict[str, quantizers_lib.Quantized],
  ]:
    """Makes the codes of images, and all groups of tokens.

    Returns:
      `codes`, `tokens` and `quantized` of a `TokenizerOutput`.
    """
    tokens = self._global_tokens(images)
    # Also in the continuous mode: the decoder always reads quantised tokens.
    quantized = {'global': self.quantizer_global(tokens)}
    # Aligners read exactly what a generator produces, in either mode.
    if self.bootstrap_from == 'quantized':
      codes = quantized['global'].codes
    else:
      codes = tokens
    local = self._predict(codes, quantized['global'].codes)
    groups = {'global': tokens, **local}
    for group in self.groups[1:]:
      quantized[group] = self._quantizer_of(group)(groups[group])
    return codes, groups, quantized

  def render(
    self, quantized: Mapping[str, Float[Array, 'b k e']]
  ) -> Float[Array, 'b h w 3']:
    """Decodes quantised tokens of every group to pixels around [-1, 1]."""
    return self._render(quantized, None)

  def encode(self, images: Float[Array, 'b h w 3']) -> Float[Array, 'b k e']:
    """Encodes images in [-1, 1] to the codes that a generator models."""
    tokens = self._global_tokens(images)
    if self.bootstrap_from == 'quantized':
      return self.quantizer_global(tokens).codes
    return tokens

  def bootstrap(
    self, codes: Float[Array, 'b k e']
  ) -> dict[str, Float[Array, 'b k e']]:
    """Predicts the local groups from the global codes, Eq. (8) and (9)."""
    quantized = codes
    if self.bootstrap_from == 'continuous' and self.local_input == 'quantized':
      quantized = self.quantizer_global(codes).codes
    return self._predict(codes, quantized)

  def decode(
    self, codes: Float[Array, 'b k e'], *, num_groups: int | None = None
  ) -> Float[Array, 'b h w 3']:
    """Decodes codes to pixels around [-1, 1], which may overshoot.

    Args:
      codes: from `encode`, or from a generator.
      num_groups: decode from only so many of `groups`, beginning with the
        first; all by default. Only a model that was trained with
        `group_dropout` gives meaningful images from fewer.

    Raises:
      ConfigError: there are not so many groups, or less than one is asked for.
    """
    if num_groups is not None:
      wanted = f'1 to {len(self.groups)}'
      fits = 1 <= num_groups <= len(self.groups)
      errors.require(fits, 'num_groups', num_groups, wanted)
    # In the quantized mode codes are mixtures of rows already; to quantise them
    # once more would change them.
    if self.bootstrap_from == 'quantized':
      quantized = {'global': codes}
    else:
      quantized = {'global': self.quantizer_global(codes).codes}
    for group, tokens in self._predict(codes, quantized['global']).items():
      quantized[group] = self._quantizer_of(group)(tokens).codes
    keep = None
    if num_groups is not None:
      # Local groups begin at 1; the global one is always there.
      kept = jnp.arange(1, len(self.groups)) < num_groups
      keep = jnp.broadcast_to(kept[None], (codes.shape[0], kept.size))
      keep = keep.astype(jnp.float32)
    return self._render(quantized, keep)

  def _predict(
    self, codes: Float[Array, 'b k e'], quantized: Float[Array, 'b k e']
  ) -> dict[str, Float[Array, 'b k e']]:
    """Predicts the local groups from codes, or from what they quantise to."""
    read = quantized if self.local_input == 'quantized' else codes
    return {group: getattr(self, group)(read) for group in self.groups[1:]}

  def _quantizer(self) -> quantizers_lib.SoftVQ:
    """Makes a quantiser with codebooks of its own."""
    return quantizers_lib.SoftVQ(
      self.codebook_size,
      self.num_codebooks,
      self.assignment,
      self.tau,
      self.quantizer_chunk,
    )

  def _quantizer_of(self, group: str) -> quantizers_lib.SoftVQ:
    """Returns the quantiser that serves a group."""
    return getattr(
      self, f'quantizer_{"global" if self.share_codebooks else group}'
    )

  def _global_tokens(
    self, images: Float[Array, 'b h w 3']
  ) -> Float[Array, 'b k e']:
    """Encodes images to global tokens before quantisation."""
    tokens = self.encoder(images)
    return layers.unit_rms(tokens) if self.unit_rms else tokens

  def _draw_kept(self, batch: int) -> Float[Array, 'b g'] | None:
    """Draws the local groups that each image keeps in training.

    Returns:
      1 for a group to keep and 0 for one to drop, [batch, groups - 1]; None
      where nothing is ever dropped.
    """
    num_locals = len(self.groups) - 1
    if not self.group_dropout or not num_locals:
      return None
    # Drawn for each image on its own, so one batch trains every prefix.
    drop_key, count_key = jax.random.split(self.make_rng('groups'))
    drops = jax.random.bernoulli(drop_key, self.group_dropout, (batch,))
    # An image loses its last groups, never one from the middle: every result is
    # a prefix. Counts are below `num_locals`, so at least one group goes.
    count = jax.random.randint(count_key, (batch,), 0, num_locals)
    count = jnp.where(drops, count, num_locals)
    return (jnp.arange(num_locals)[None] < count[:, None]).astype(jnp.float32)

  def _render(
    self,
    quantized: Mapping[str, Float[Array, 'b k e']],
    keep: Float[Array, 'b g'] | None,
  ) -> Float[Array, 'b h w 3']:
    """Fuses and decodes quantised groups.

    Where `keep` is 0 a local group is replaced by the global one, whereby its
    weight in the sum goes to the global tokens, and its cross-attention is
    switched off. None keeps all.
    """
    first = quantized['global']
    if keep is None:
      keep = jnp.ones((first.shape[0], len(self.groups) - 1))
    codes, contexts, kept = [first], [], []
    for i, group in enumerate(self.groups[1:]):
      mask = keep[:, i]
      # Selected per image, so that shapes do not depend on what was drawn.
      chosen = jnp.where(mask[:, None, None] > 0, quantized[group], first)
      codes.append(chosen)
      # Not replaced: the decoder multiplies what it reads here by `mask`.
      contexts.append(quantized[group])
      kept.append(mask)
    fused = self.fuse(codes)
    # The fused tokens are there for every image, whatever was dropped.
    if self.cross_attend == 'all':
      contexts.append(fused)
      kept.append(jnp.ones_like(keep[:, 0]) if kept else jnp.ones(len(first)))
    return self.decoder(fused, contexts, kept)


def model_params(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns the tokenizer's own parameters, without the heads to teachers."""
  return {k: v for k, v in params.items() if not k.startswith(PROJECTOR)}


def split_trainable(
  params: Mapping[str, PyTree], trainable: tuple[str, ...]
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Splits a tokenizer's parameters by module name.

  Args:
    params: parameters by module.
    trainable: names of the modules to train.

  Returns:
    (parameters to train, parameters that stay fixed).

  Raises:
    ConfigError: `trainable` is empty or names a module that does not exist.
  """
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
  """Returns the parameters to load for use.

  These are the running means of what was trained, and the fixed rest.

  Args:
    params: a run's parameters by group; 'base' are the fixed ones, if any.
    ema: running means by group.
  """
  return model_params({**params.get('base', {}), **ema['tokenizer']})


def encoding_params(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns the parameters of the modules that `Tokenizer.encode` reads."""
  return {k: params[k] for k in ('encoder', 'quantizer_global')}
