import jax
import jax.numpy as jnp

from selfboottok_jax import pretrained


def test_features_are_a_pytree_that_may_hold_anything():
  def see(x):
    return pretrained.Features(x, x[:, 0])

  x = jnp.ones((2, 3, 4))
  shapes = jax.eval_shape(see, x)
  assert shapes.patches.shape == (2, 3, 4)
  assert shapes.cls.shape == (2, 4)
  nothing = jax.tree.map(lambda _: None, see(x))
  assert nothing.patches is None
  assert jax.tree.leaves(pretrained.Features(x)) == [x]
