import jax
import jax.numpy as jnp
import numpy as np

from selfboottok_jax.objectives import adversarial


def test_hinge_by_hand():
  real, fake = jnp.array([2.0, 0.5, -1.0]), jnp.array([-3.0, 0.0, 1.0])
  # relu(1 - real) = 0, 0.5, 2; relu(1 + fake) = 0, 1, 2.
  value = adversarial.hinge_discriminator(real, fake)
  np.testing.assert_allclose(value, 0.5 * (2.5 / 3 + 1.0), rtol=1e-6)
  np.testing.assert_allclose(
    adversarial.hinge_generator(fake), 2 / 3, rtol=1e-6
  )


def test_discriminator_stops_at_the_margin():
  real, fake = jnp.array([1.5, 3.0]), jnp.array([-1.5, -3.0])
  gradients = jax.grad(adversarial.hinge_discriminator, argnums=(0, 1))(
    real, fake
  )
  np.testing.assert_array_equal(jnp.stack(gradients), 0)
  pull = jax.grad(adversarial.hinge_generator)(fake)
  np.testing.assert_allclose(pull, -0.5)


def test_lecam_reads_averages_that_hold_the_present_logits():
  real, fake = jnp.array([2.0, 4.0]), jnp.array([-1.0, -3.0])
  state = {'real': jnp.float32(1.0), 'fake': jnp.float32(-0.5)}
  value, new = adversarial.lecam(state, real, fake, decay=0.5)
  np.testing.assert_allclose(new['real'], 0.5 * 1.0 + 0.5 * 3.0)
  np.testing.assert_allclose(new['fake'], 0.5 * -0.5 + 0.5 * -2.0)

  def by_hand(averages):
    above = np.maximum(np.asarray(real) - averages['fake'], 0) ** 2
    below = np.maximum(averages['real'] - np.asarray(fake), 0) ** 2
    return above.mean() + below.mean()

  np.testing.assert_allclose(value, by_hand(new), rtol=1e-6)
  assert abs(by_hand(state) - value) > 1


def test_lecam_averages_carry_no_gradient():
  real, fake = jnp.array([2.0, 4.0]), jnp.array([-1.0, -3.0])
  state = adversarial.init_lecam()
  gradient = jax.grad(
    lambda real: adversarial.lecam(state, real, fake, decay=0.0)[0]
  )(real)
  # With decay 0 the averages are the means, here 3 and -2.
  np.testing.assert_allclose(gradient, (real + 2.0) * 2 / 2)


def test_low_precision_logits_give_float32():
  logits = jnp.ones((4, 2), jnp.bfloat16)
  leaves = jax.tree.leaves(
    [
      adversarial.hinge_discriminator(logits, logits),
      adversarial.lecam(adversarial.init_lecam(), logits, logits),
    ]
  )
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}


def test_consistency_is_the_mean_square_of_both_sides():
  weak = jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0])
  strong = jnp.array([1.0, 5.0]), jnp.array([1.0, 0.0])
  value = adversarial.consistency(weak, strong)
  np.testing.assert_allclose(value, (0 + 9 + 1 + 0) / 4)
  # It pulls at either side.
  gradient = jax.grad(adversarial.consistency, argnums=(0, 1))(weak, strong)
  np.testing.assert_allclose(gradient[0][0], [0, -1.5])
  np.testing.assert_allclose(gradient[1][0], [0, 1.5])


def test_pull_is_the_same_loss_gone_through_once():
  def loss(x):
    calls.append(x)
    return jnp.sum(jnp.sin(x) ** 3), {'mean': jnp.mean(x)}

  def wrapped(w):
    value, other, gradient = adversarial.pull(loss, 3 * w)
    return 2 * value, (other, gradient)

  calls, w = [], jax.random.normal(jax.random.key(0), (5,))
  (value, (other, gradient)), slope = jax.value_and_grad(wrapped, has_aux=True)(
    w
  )
  assert len(calls) == 1
  expected = jax.grad(lambda w: 2 * loss(3 * w)[0])(w)
  np.testing.assert_allclose(slope, expected, rtol=1e-5)
  np.testing.assert_allclose(value, 2 * loss(3 * w)[0], rtol=1e-6)
  np.testing.assert_allclose(other['mean'], jnp.mean(3 * w))
  direct = jax.grad(lambda x: loss(x)[0])(3 * w)
  np.testing.assert_allclose(gradient, direct, rtol=1e-6)
  # The gradient that is handed out is a number, not a function of w.
  nothing = jax.grad(lambda w: jnp.sum(adversarial.pull(loss, 3 * w)[2]))(w)
  np.testing.assert_array_equal(nothing, 0)


def test_adaptive_weight_by_hand():
  features = jnp.array([[[1.0, 2.0], [0.0, 1.0]]])
  towards, away = jnp.array([[[3.0], [4.0]]]), jnp.array([[[0.5], [0.0]]])
  # Gradients in the kernel: (3, 10) and (0.5, 1).
  expected = np.hypot(3, 10) / (np.hypot(0.5, 1) + 1e-4)
  ratio = adversarial.adaptive_weight(features, towards, away)
  np.testing.assert_allclose(ratio, expected, rtol=1e-6)
  nothing = jnp.zeros_like(away)
  largest = adversarial.adaptive_weight(features, 1e9 * towards, nothing)
  np.testing.assert_allclose(largest, 1e4)
  assert adversarial.adaptive_weight(features, nothing, away) == 0
  slope = jax.grad(adversarial.adaptive_weight)(features, towards, away)
  np.testing.assert_array_equal(slope, 0)
