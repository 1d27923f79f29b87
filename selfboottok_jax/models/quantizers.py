"""Soft vector quantisation: a code is a mixture of codebook rows."""

import functools
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# TPUs and GPUs multiply float32 in 16 or 19 bits by default. At tau = 0.07 such
# errors are magnified 14 times, enough to change the nearest code.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def unit(x: Float[Array, '*b e']) -> Float[Array, '*b e']:
  """L2-normalises the last axis; zero stays zero, with a finite gradient."""
  square = jnp.sum(x * x, axis=-1, keepdims=True)
  # The bound stands under the root: the gradient of a norm at zero is NaN, and
  # stays NaN when the value is bounded afterwards.
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def cosine_logits(
  z: Float[Array, 'b n s e'], codebook: Float[Array, 'n v e']
) -> Float[Array, 'b n s v']:
  """Returns the cosine of each token and code, in [-1, 1].

  The codebook must have rows of unit length; tokens are normalised here.
  """
  return _einsum('bnse,nve->bnsv', unit(z), codebook)


def l2_logits(
  z: Float[Array, 'b n s e'], codebook: Float[Array, 'n v e']
) -> Float[Array, 'b n s v']:
  """Returns minus the Euclidean distance, not squared: Eq. (2)."""
  # Expanded to a matrix product: differences would need [b, n, s, v, e] values.
  square = (
    jnp.sum(z * z, axis=-1)[..., None]
    - 2 * _einsum('bnse,nve->bnsv', z, codebook)
    + jnp.sum(codebook * codebook, axis=-1)[None, :, None]
  )
  # The square root has no gradient at zero, and rounding can go below it.
  return -jnp.sqrt(jnp.maximum(square, 1e-12))


ASSIGNMENTS: dict[str, Callable[..., jax.Array]] = {
  'cosine': cosine_logits,
  'l2': l2_logits,
}


def split_tokens(
  segments: Float[Array, 'b n s e'], chunk: int
) -> Float[Array, 'c b n m e']:
  """Cuts each segment into chunks of m = `chunk` tokens, on a new first axis.

  A `chunk` of 0 makes one chunk of all s tokens; others must divide s.
  """
  # The token axis is cut and not the batch, which is sharded over devices: a
  # scan over pieces of the batch would leave most of them idle.
  b, n, s, e = segments.shape
  x = segments.reshape(b, n, -1, chunk or s, e)
  return jnp.moveaxis(x, 2, 0)


@flax.struct.dataclass
class Quantized:
  """The result of quantising one group of tokens.

  Logits, probabilities and indices are computed when they are read: for large
  codebooks they dwarf the codes, and inference needs none of them.

  Attributes:
    codes: quantised tokens z_q [b, k, e].
    segments: the tokens before quantisation, grouped by the codebook that
      serves them [b, n, s, e].
    codebook: rows of every codebook, without a gradient [n, v, e].
    assignment: how tokens and rows are compared, a key of ASSIGNMENTS.
    tau: temperature of the softmax over rows.
  """

  codes: Float[Array, 'b k e']
  segments: Float[Array, 'b n s e']
  codebook: Float[Array, 'n v e']
  # Not arrays, hence static: jit compiles anew where they differ.
  assignment: str = flax.struct.field(pytree_node=False)
  tau: float = flax.struct.field(pytree_node=False)

  def logits_of(
    self, segments: Float[Array, 'b n s e']
  ) -> Float[Array, 'b n s v']:
    """Returns the similarity of tokens to each row, before the temperature."""
    return ASSIGNMENTS[self.assignment](segments, self.codebook)

  @property
  def logits(self) -> Float[Array, 'b n s v']:
    """The similarity of all tokens to each row, before the temperature."""
    return self.logits_of(self.segments)

  @property
  def probs(self) -> Float[Array, 'b n s v']:
    """The soft assignment softmax(logits / tau); sums to 1 over the rows."""
    return jax.nn.softmax(self.logits / self.tau, axis=-1)

  @property
  def indices(self) -> Int[Array, 'b n s']:
    """The nearest row of each token, an index into its own codebook."""
    return jnp.argmax(self.logits, axis=-1)


class SoftVQ(nn.Module):
  """Replaces tokens by mixtures of codebook rows, Eq. (2) and (3).

  The mixture softmax(similarity / tau) C is differentiable throughout.

  The tokens are cut into `num_codebooks` contiguous segments, each with its own
  codebook. Rows are detached in the logits, so a codebook learns through the
  mixture alone. There is no commitment loss, straight-through estimate or
  restart of unused rows: the mixture gives every row a gradient.

  Attributes:
    codebook_size: rows of each codebook (v).
    num_codebooks: codebooks, a divisor of the number of tokens (n).
    assignment: 'cosine', for which rows are normalised at every use, or 'l2'.
    tau: temperature of the softmax; lower is closer to the nearest row.
    chunk: tokens of each segment whose logits are in memory at a time; 0 for
      all. Values and gradients are the same, but the backward pass computes
      the logits again.
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
    # At least float32, whatever the encoder computes in.
    dtype = jnp.promote_types(z.dtype, jnp.float32)
    codebook = codebook.astype(dtype)
    if self.assignment == 'cosine':
      codebook = unit(codebook)
    segments = z.astype(dtype).reshape(b, self.num_codebooks, -1, e)
    # As in attention, with the codebook as keys and as values; only the values
    # receive a gradient.
    keys = jax.lax.stop_gradient(codebook)

    def mix(part: Float[Array, 'b n m e']) -> Float[Array, 'b n m e']:
      logits = ASSIGNMENTS[self.assignment](part, keys)
      probs = jax.nn.softmax(logits / self.tau, axis=-1)
      return _einsum('bnsv,nve->bnse', probs, codebook)

    if self.chunk:
      # Without the checkpoint the loop would keep every chunk's logits for the
      # backward pass. A loop body needs no protection against CSE.
      chunks = split_tokens(segments, self.chunk)
      mixed = jax.lax.map(jax.checkpoint(mix, prevent_cse=False), chunks)
      # The chunk axis goes back in front of the tokens it was cut from.
      codes = jnp.moveaxis(mixed, 0, 2).reshape(segments.shape)
    else:
      codes = mix(segments)
    return Quantized(
      codes.reshape(b, k, e), segments, keys, self.assignment, self.tau
    )

  def _init(
    self, key: jax.Array, shape: tuple[int, ...]
  ) -> Float[Array, 'n v e']:
    bound = 1.0 / self.codebook_size
    uniform = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
    # Normalised already here: 'l2' uses the rows as they are.
    return unit(uniform)
