"""Normalisations that remember: spectral norm, and batch norm.

What they remember is a variable of the collection NORMS, which a training
forward (`train=True`) updates and its caller stores: there is no gradient in
it. It is float32 whatever the computation is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# The collection; give it as `mutable` where `train` is True.
NORMS = 'norms'


class SpectralNorm(nn.Module):
  """Divides a kernel by an estimate of its largest singular value.

  The kernel is read as a matrix from all its inputs to its outputs, its last
  axis. A training forward improves the estimate by one step of the power
  iteration (Miyato et al., 2018), which starts at random: it is good after some
  forwards, and below the true value before. The singular vectors `u` (outputs)
  and `v` (inputs) are constants for the gradient.
  """

  @nn.compact
  def __call__(
    self, kernel: Float[Array, '*s o'], *, train: bool = False
  ) -> Float[Array, '*s o']:
    matrix = kernel.reshape(-1, kernel.shape[-1])
    v, u = (
      self.variable(NORMS, name, self._random_unit, size)
      for name, size in zip('vu', matrix.shape, strict=True)
    )
    if train and not self.is_initializing():
      fixed = jax.lax.stop_gradient(matrix)
      v.value = _unit(_product(fixed, u.value))
      u.value = _unit(_product(v.value, fixed))
    return kernel / jnp.vdot(_product(v.value, matrix), u.value)

  def _random_unit(self, size):
    return _unit(jax.random.normal(self.make_rng('params'), (size,)))


class BatchNorm(nn.Module):
  """Zero mean and unit variance per channel over a batch, then an affine map.

  With a batch that is sharded over devices the statistics are those of the
  whole of it: under `jit` a mean over an axis is over all of the axis, and XLA
  adds the sum over devices. The variance is the biased one where it
  normalises and the unbiased one in the running mean, as in torch.

  Attributes:
    momentum: share of the newest batch in the running statistics, which a
      forward outside of training normalises with.
    epsilon: added to the variance.
    dtype: of the result; statistics are float32.
  """

  momentum: float = 0.1
  epsilon: float = 1e-6
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self, x: Float[Array, '*b d'], *, train: bool = False
  ) -> Float[Array, '*b d']:
    width, axes = x.shape[-1], tuple(range(x.ndim - 1))
    scale = self.param('scale', nn.initializers.ones, (width,))
    bias = self.param('bias', nn.initializers.zeros, (width,))
    mean = self.variable(NORMS, 'mean', jnp.zeros, (width,))
    variance = self.variable(NORMS, 'variance', jnp.ones, (width,))
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def along(channels):
      return jnp.expand_dims(channels, axes)

    if not train:
      centred, spread = x - along(mean.value), variance.value
    else:
      centre = jnp.mean(x, axis=axes)
      centred = x - along(centre)
      spread = jnp.mean(jnp.square(centred), axis=axes)
      if not self.is_initializing():
        count = x.size // width
        self._follow(mean, centre)
        self._follow(variance, spread * (count / max(count - 1, 1)))
    normal = centred * along(jax.lax.rsqrt(spread + self.epsilon) * scale)
    return (normal + along(bias)).astype(self.dtype)

  def _follow(self, running, new):
    new = jax.lax.stop_gradient(new)
    running.value += self.momentum * (new - running.value)


def _unit(x: Float[Array, ' n']) -> Float[Array, ' n']:
  return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


def _product(a, b):
  # Accelerators would round to bfloat16 or TF32, and sigma with it.
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
