"""The transformer block and the scanned, rematerialised stack of blocks."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from selfboottok_jax import placement
from selfboottok_jax.models import layers


def _keep_products(primitive: Any, *types: Any, **params: Any) -> bool:
  """Keeps products of activations and weights, and flash attention's results.

  These are most of the arithmetic. What lies between them, as norms and GELUs,
  is cheaper to compute again than to write to memory and to read back.
  """
  if primitive.name == 'dot_product_attention_fwd_wrapper':
    return True
  if primitive.name == 'name' and params['name'] == layers.KEPT:
    return True
  # A product over batches is one of activations alone: the matrix of attention
  # weights, which is as large as it is cheap.
  keeps = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
  return keeps(primitive, *types, **params)


# What the backward pass computes again instead of finding it in memory, as
# policies of `jax.checkpoint`: nothing; all but the products; whole blocks.
REMATS: dict[str, Callable[..., Any] | None] = {
  'none': jax.checkpoint_policies.everything_saveable,
  'dots': _keep_products,
  'block': None,
}


def remat_of(value: str | bool) -> str:
  """Returns the key of REMATS that a field `remat` means.

  Runs of earlier versions have True for 'block' and False for 'none'. What is
  no such value is returned as it is.
  """
  names = {'true': 'block', 'false': 'none'}
  return names.get(str(value).lower(), str(value))


# Deeper stacks take CPUs too long to compile without a loop.
_MOST_UNROLLED = 16


def blocks_per_iteration(unroll: int, depth: int, dtype: str) -> int:
  """Returns how many blocks an iteration of the compiled loop has.

  XLA cannot fuse across iterations; unrolling trades compile time for it. On
  CPUs a float32 step of 12 blocks gets a quarter faster, where accelerators are
  busy with the products inside a block. So 0 unrolls float32 stacks of up to 16
  blocks there, and no others.

  Args:
    unroll: blocks that are asked for; 0 chooses.
    depth: blocks of the stack.
    dtype: in which they compute.
  """
  if unroll:
    return min(unroll, depth)
  # CPUs compute 16-bit numbers to try out what accelerators will compute.
  is_at_home = placement.platform() == 'cpu' and dtype == 'float32'
  return depth if is_at_home and depth <= _MOST_UNROLLED else 1


class Block(nn.Module):
  """Pre-norm self-attention and MLP with an optional LayerScale.

  Attributes:
    heads: attention heads, a divisor of the width of x.
    mlp_ratio: hidden width of the MLP over that of x.
    layer_scale: initial gain of each residual branch (DINOv2: 1e-5); 0 leaves
      the gains out, parameters included.
    attention: implementation, see `layers.Attention`.
    dtype: type of the computation; parameters are float32.
    gelu: a key of `layers.GELUS`.
  """

  heads: int
  mlp_ratio: float = 4.0
  layer_scale: float = 0.0
  attention: str = 'auto'
  dtype: str = 'float32'
  gelu: str = 'exact'

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'b k d'],
    mask: Bool[Array, 'k k'] | None = None,
  ) -> Float[Array, 'b k d']:
    attend = layers.Attention(
      self.heads, implementation=self.attention, dtype=self.dtype, name='attn'
    )
    mlp = layers.Mlp(self.mlp_ratio, self.gelu, self.dtype, name='mlp')
    norm = functools.partial(layers.layer_norm, self.dtype)
    x = x + self._gain('scale1', attend(norm('norm1')(x), mask=mask))
    return x + self._gain('scale2', mlp(norm('norm2')(x)))

  def _gain(
    self, name: str, branch: Float[Array, 'b k d']
  ) -> Float[Array, 'b k d']:
    if not self.layer_scale:
      return branch
    init = nn.initializers.constant(self.layer_scale)
    gain = self.param(name, init, (branch.shape[-1],))
    # Cast first: a float32 gain would promote the residual stream.
    return branch * gain.astype(branch.dtype)[None, None]


class Stack(nn.Module):
  """Applies `depth` blocks in a row by a scan over their parameters.

  On a mesh (`placement`) each device has its share of the images between any
  two blocks. A block's weights are gathered when it is their turn, once in each
  pass: no device ever holds those of all blocks.

  Attributes:
    block: builds one block, given `name`; its call is (x, *context) -> x. Every
      block gets the same context.
    depth: number of blocks; their parameters are stacked on a first axis.
    remat: what the backward pass computes again instead of keeping it, see
      REMATS.
    unroll: blocks per iteration of the compiled loop; `depth` unrolls it all, 0
      chooses by platform, see `blocks_per_iteration`.
    dtype: in which blocks compute their products. Matrices are gathered in it,
      as casting them first halves the traffic of a 16-bit type. The residual
      stream has the type of `x`, which may be wider.
  """

  block: Callable[..., nn.Module]
  depth: int
  remat: str | bool = 'none'
  unroll: int = 0
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, 'b k d'], *context: Any
  ) -> Float[Array, 'b k d']:
    def call(
      block: nn.Module, x: Float[Array, 'b k d'], *context: Any
    ) -> Float[Array, 'b k d']:
      return block(x, *context)

    gathers = placement.shares_weights()
    if gathers:
      call = nn.map_variables(
        call, 'params', self._gathered, init=self.is_initializing()
      )

    def body(
      block: nn.Module, x: Float[Array, 'b k d'], *context: Any
    ) -> tuple[Float[Array, 'b k d'], None]:
      x = call(block, placement.split_batch(x), *context)
      # (carry, output per iteration), as a scan wants it.
      return placement.split_batch(x), None

    remat = remat_of(self.remat)
    policy = REMATS[remat]
    if remat == 'none' and gathers:
      # Kept too, the gathered weights of all blocks would be in memory at once.
      policy = _all_but_gathered
    if remat != 'none' or gathers:
      # Inside a scan there is nothing for CSE to undo, and preventing it costs
      # optimisation barriers.
      body = nn.remat(body, prevent_cse=False, policy=policy)
    # One traced block instead of `depth` copies keeps compilation short. Block
    # i owns row i of every parameter, and is initialised with its own key.
    scan = nn.scan(
      body,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast,) * len(context),
      length=self.depth,
      unroll=blocks_per_iteration(self.unroll, self.depth, self.dtype),
    )
    x, _ = scan(self.block(name='block'), x, *context)
    return x

  def _gathered(self, variables: PyTree) -> PyTree:
    """A block's variables, its matrices in `dtype`, on every device."""
    return jax.tree.map(
      lambda leaf: placement.gather(
        leaf.astype(self.dtype) if leaf.ndim > 1 else leaf
      ),
      variables,
    )


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
  """Keeps all results for the backward pass that were not just moved."""
  return primitive.name != 'sharding_constraint'


# Names of stacks of blocks begin so.
SEGMENT = 'blocks_'


def segment_name(first: int) -> str:
  """Returns the name of the stack that begins with block `first`.

  Checkpoints contain it.
  """
  return f'{SEGMENT}{first}'


def segments(depth: int, taps: tuple[int, ...]) -> list[tuple[int, int]]:
  """Cuts `depth` blocks into stacks that end at each of the `taps`.

  A scan hides the activations between its blocks, so a stack must end wherever
  they are read.

  Returns:
    (first block, one past the last) of every stack, in order.
  """
  # The set absorbs repeated taps and one at the end; 0 is the input itself.
  ends = sorted({*taps, depth} - {0})
  return list(zip([0, *ends], ends, strict=False))


def prefix_causal_mask(
  prefix: int, queries: int, *, causal: bool = True
) -> Bool[Array, 'm m']:
  """Returns the attention mask of the sequence [prefix, queries], Eq. (9).

  It is True at [row, column] where position `row` may see position `column`.
  Prefix rows see the whole prefix and never a query, so that the prefix cannot
  depend on what is predicted from it. Queries see the prefix and, with
  `causal`, the queries up to themselves; without it, all queries.
  """
  # The prefix is visible to all; only the columns of queries are in question.
  total = prefix + queries
  row = jnp.arange(total)[:, None]
  column = jnp.arange(total)[None]
  sees_query = (row >= prefix) & ((column <= row) if causal else True)
  return jax.lax.stop_gradient((column < prefix) | sees_query)
