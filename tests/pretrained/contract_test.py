import jax
import jax.numpy as jnp
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import contract


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


def test_options_out_of_range_are_refused():
  contract.check_options('net', dtype='bfloat16', grid=1)
  contract.check_options('net', least=0, patch_size=0)
  with pytest.raises(errors.UserError, match='net: grid=0; wanted 1'):
    contract.check_options('net', grid=0)
  with pytest.raises(errors.UserError, match="'half'; wanted one of float32"):
    contract.check_options('net', dtype='half')
