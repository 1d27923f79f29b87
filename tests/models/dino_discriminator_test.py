import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.models import dino_discriminator, normalization
from selfboottok_jax.objectives import adversarial

B, N, D = 4, 6, 8


@pytest.fixture(scope='module')
def activations():
  keys = jax.random.split(jax.random.key(0), 3)
  return [1 + 2 * jax.random.normal(key, (B, N, D)) for key in keys]


@pytest.fixture(scope='module')
def module():
  return dino_discriminator.DinoDiscriminator(kernel=3)


@pytest.fixture(scope='module')
def variables(module, activations):
  return jax.jit(module.init)(jax.random.key(1), activations)


def _train(module, variables, activations):
  return module.apply(
    variables, activations, train=True, mutable=[normalization.NORMS]
  )


def test_a_logit_for_each_depth_and_patch(module, variables, activations):
  logits, _ = _train(module, variables, activations)
  assert logits.shape == (B, 3 * N)
  assert logits.dtype == jnp.float32
  # Heads one after the other: each reads its own depth.
  others = [activations[0], -activations[1], activations[2]]
  changed = np.any(_train(module, variables, others)[0] != logits, axis=0)
  np.testing.assert_array_equal(changed, np.repeat([False, True, False], N))


def test_paper_size():
  module = dino_discriminator.DinoDiscriminator()
  shapes = [jax.ShapeDtypeStruct((1, 196, 384), jnp.float32)] * 5
  variables = jax.eval_shape(module.init, jax.random.key(0), shapes)
  count = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
  assert count == pytest.approx(7.4e6, rel=0.01)


@pytest.mark.parametrize('kernel', [1, 3, 5])
def test_positions_are_a_ring(kernel, activations):
  module = dino_discriminator.DinoDiscriminator(kernel=kernel)
  variables = module.init(jax.random.key(1), activations[:1])
  x = activations[0]
  logits = module.apply(variables, [x])
  turned = module.apply(variables, [jnp.roll(x, 2, axis=1)])
  np.testing.assert_allclose(turned, jnp.roll(logits, 2, axis=1), atol=1e-5)
  seen = jax.jacobian(lambda x: module.apply(variables, [x])[0, 0])(x)[0]
  reached = np.flatnonzero(np.any(seen != 0, axis=-1))
  around = {i % N for i in range(-(kernel // 2), kernel // 2 + 1)}
  assert set(reached) == around


def test_kernels_have_unit_norm_once_seen_often(module, variables, activations):
  step = jax.jit(lambda v: v | _train(module, v, activations)[1])
  for _ in range(100):
    variables = step(variables)
  conv = dino_discriminator.SpectralConv(D, 3)
  head = variables['params']['head_0']['around']['conv']
  norms = variables[normalization.NORMS]['head_0']['around']['conv']
  eye = jnp.eye(N * D).reshape(N * D, N, D)
  no_bias = head | {'bias': jnp.zeros(D)}
  kernel = conv.apply({'params': no_bias, normalization.NORMS: norms}, eye)
  # The operator on the ring is bounded by the taps' sum, and is no zero.
  largest = np.linalg.norm(kernel.reshape(N * D, N * D), ord=2)
  assert 0.5 < largest <= np.sqrt(3) * 1.001
  matrix = head['kernel'].reshape(-1, D)
  sigma = norms['spectral']['v'] @ matrix @ norms['spectral']['u']
  np.testing.assert_allclose(sigma, np.linalg.norm(matrix, ord=2), rtol=1e-4)


def test_initial_logits_are_of_size_one(module, variables, activations):
  logits, _ = _train(module, variables, activations)
  assert 0.05 < jnp.std(logits) < 3


def test_each_training_forward_moves_every_statistic(
  module, variables, activations
):
  _, after = _train(module, variables, activations)
  before = variables[normalization.NORMS]
  moved = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), before, after[normalization.NORMS]
  )
  for head in moved.values():
    # A single output has one unit vector.
    assert not head['logit']['spectral'].pop('u')
  assert all(jax.tree.leaves(moved))


def test_every_parameter_learns_to_tell_batches_apart(
  module, variables, activations
):
  params, norms = variables['params'], variables[normalization.NORMS]
  fake = [x * jnp.linspace(-1, 1, D)[None, None] for x in activations]

  @jax.jit
  def step(params, norms):
    def loss(params):
      now, logits = norms, []
      for seen in (activations, fake):
        judged, updated = _train(
          module, {'params': params, normalization.NORMS: now}, seen
        )
        now = updated[normalization.NORMS]
        logits.append(judged)
      return adversarial.hinge_discriminator(*logits), now

    (value, now), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    new = jax.tree.map(lambda p, g: p - g, params, gradient)
    return new, now, value, gradient

  first = None
  for _ in range(150):
    params, norms, value, gradient = step(params, norms)
    if first is None:
      first = value
      for head in gradient.values():
        for layer in ('embed', 'around'):
          # Batch norm takes it out again.
          bias = head[layer]['conv'].pop('bias')
          assert np.max(np.abs(bias)) < 1e-6
        # Half of the logits push up, half down.
        del head['logit']['bias']
      assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))
  assert value < 0.7 * first


def test_bfloat16_follows_float32(module, variables, activations):
  low = dino_discriminator.DinoDiscriminator(kernel=3, dtype='bfloat16')
  exact, _ = _train(module, variables, activations)
  rough, after = _train(low, variables, activations)
  assert rough.dtype == jnp.float32
  assert jnp.any(rough != exact)
  np.testing.assert_allclose(rough, exact, atol=0.1)
  assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype('float32')}


def test_an_even_kernel_has_no_middle(activations):
  module = dino_discriminator.DinoDiscriminator(kernel=4)
  with pytest.raises(errors.ConfigError, match='kernel=4; wanted an odd'):
    module.init(jax.random.key(0), activations)
