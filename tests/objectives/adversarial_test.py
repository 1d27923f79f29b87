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


def test_discriminator_loss_is_made_of_its_parts():
  real = jax.random.normal(jax.random.key(0), (6,))
  fake = jax.random.normal(jax.random.key(1), (6,))
  result = adversarial.discriminator_loss(
    real,
    fake,
    adversarial.init_lecam(),
    lecam_weight=0.25,
  )
  np.testing.assert_allclose(
    result.loss, result.hinge + 0.25 * result.regulariser, rtol=1e-6
  )
  regulariser, state = adversarial.lecam(adversarial.init_lecam(), real, fake)
  assert regulariser == result.regulariser
  assert state == result.lecam


def test_low_precision_logits_give_float32():
  logits = jnp.ones((4, 2), jnp.bfloat16)
  result = adversarial.discriminator_loss(
    logits, logits, adversarial.init_lecam()
  )
  leaves = jax.tree.leaves(result)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype('float32')}
