"""Soft vector quantisation: a code is a mixture of codebook rows."""

import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# TPU and GPU multiply float32 in 16 or 19 bits unless told otherwise, which at
# tau = 0.07 changes the nearest code.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def unit(x: Float[Array, '*b e']) -> Float[Array, '*b e']:
  """L2-normalises the last axis; zero stays zero, with a finite gradient."""
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosine_logits(
  z: Float[Array, 'b n s e'], codebook: Float[Array, 'n v e']
) -> Float[Array, 'b n s v']:
  """Cosine of tokens and codes; the codebook is already on the sphere."""
  return _einsum('bnse,nve->bnsv', unit(z), codebook)


def l2_logits(
  z: Float[Array, 'b n s e'], codebook: Float[Array, 'n v e']
) -> Float[Array, 'b n s v']:
  """Minus the plain Euclidean distance, as Eq. (2) writes it."""
  square = (
    jnp.sum(z * z, axis=-1)[..., None]
    - 2 * _einsum('bnse,nve->bnsv', z, codebook)
    + jnp.sum(codebook * codebook, axis=-1)[None, :, None]
  )
  # The square root has no gradient at zero, and rounding can go below it.
  return -jnp.sqrt(jnp.maximum(square, 1e-12))


ASSIGNMENTS = {'cosine': cosine_logits, 'l2': l2_logits}


def split_tokens(
  segments: Float[Array, 'b n s e'], chunk: int
) -> Float[Array, 'c b n m e']:
  """Cuts each segment into chunks of m = `chunk` tokens; 0 makes it one.

  Tokens are cut, not images: those lie on different devices.
  """
  b, n, s, e = segments.shape
  x = segments.reshape(b, n, -1, chunk or s, e)
  return jnp.moveaxis(x, 2, 0)


@flax.struct.dataclass
class Quantized:
  """What a quantiser says of a group of tokens.

  Attributes:
    codes: quantised tokens z_q [b, k, e].
    segments: the tokens by the codebook that serves them [b, n, s, e].
    codebook: its rows, without a gradient [n, v, e].
    assignment: how the two are compared.
    tau: temperature of the assignment.
  """

  codes: Float[Array, 'b k e']
  segments: Float[Array, 'b n s e']
  codebook: Float[Array, 'n v e']
  assignment: str = flax.struct.field(pytree_node=False)
  tau: float = flax.struct.field(pytree_node=False)

  def logits_of(
    self, segments: Float[Array, 'b n s e']
  ) -> Float[Array, 'b n s v']:
    """Similarity to each code, before the temperature."""
    return ASSIGNMENTS[self.assignment](segments, self.codebook)

  @property
  def logits(self) -> Float[Array, 'b n s v']:
    """Of all tokens at once."""
    return self.logits_of(self.segments)

  @property
  def probs(self) -> Float[Array, 'b n s v']:
    """Soft assignment softmax(logits / tau)."""
    return jax.nn.softmax(self.logits / self.tau, axis=-1)

  @property
  def indices(self) -> Int[Array, 'b n s']:
    """The nearest code of each token, by token order within its segment."""
    return jnp.argmax(self.logits, axis=-1)


class SoftVQ(nn.Module):
  """Eq. (2) and (3): Z = softmax(similarity / tau) C, fully differentiable.

  The tokens are cut into `num_codebooks` contiguous segments, each with its own
  codebook. Codes are detached in the logits: a codebook learns through the
  mixture alone. No commitment loss, no straight-through, no restarts. With
  `assignment='cosine'` the codes are L2-normalised at every use.

  With `chunk`, logits of so many tokens of each segment exist at a time, in the
  forward pass and again, computed anew, in the backward pass. It is attention
  with the codebook as keys and values, and the same values and gradients.
  """

  codebook_size: int
  num_codebooks: int = 1
  assignment: str = 'cosine'
  tau: float = 0.07
  chunk: int = 0

  @nn.compact
  def __call__(self, z: Float[Array, 'b k e']) -> Quantized:
    b, k, e = z.shape
    codebook = self.param(
      'codebook', self._init, (self.num_codebooks, self.codebook_size, e)
    )
    dtype = jnp.promote_types(z.dtype, jnp.float32)
    codebook = codebook.astype(dtype)
    if self.assignment == 'cosine':
      codebook = unit(codebook)
    segments = z.astype(dtype).reshape(b, self.num_codebooks, -1, e)
    keys = jax.lax.stop_gradient(codebook)

    def mix(segments):
      logits = ASSIGNMENTS[self.assignment](segments, keys)
      probs = jax.nn.softmax(logits / self.tau, axis=-1)
      return _einsum('bnsv,nve->bnse', probs, codebook)

    if self.chunk:
      # Without the checkpoint the scan would keep every chunk's logits.
      chunks = split_tokens(segments, self.chunk)
      mixed = jax.lax.map(jax.checkpoint(mix, prevent_cse=False), chunks)
      codes = jnp.moveaxis(mixed, 0, 2).reshape(segments.shape)
    else:
      codes = mix(segments)
    return Quantized(
      codes.reshape(b, k, e), segments, keys, self.assignment, self.tau
    )

  def _init(self, key: jax.Array, shape: tuple[int, ...]):
    bound = 1.0 / self.codebook_size
    uniform = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    return unit(uniform)
