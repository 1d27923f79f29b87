import jax
import jax.numpy as jnp
import numpy as np
import torch

from selfboottok_jax.models import layers, sit
from tests import tiny
from tests.parity import torch_sit

B, K, E, CLASSES, WIDTH, DEPTH, HEADS = 3, 8, 4, 5, 32, 3, 4


def test_velocity_and_gradients_are_those_of_torch():
  model = sit.SiT(K, E, CLASSES, WIDTH, DEPTH, HEADS)
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (B, K, E))
  t = jax.random.uniform(keys[1], (B,))
  labels = jnp.array([0, 3, CLASSES])
  params = tiny.awake(model.init(keys[2], x, t, labels))['params']

  def loss(params):
    velocity = model.apply({'params': params}, x, t, labels).tokens
    return jnp.mean(velocity**2), velocity

  (_, velocity), gradients = jax.value_and_grad(loss, has_aux=True)(params)

  positions = layers.sincos_1d(K, WIDTH)
  arguments = positions, E, CLASSES, WIDTH, DEPTH, HEADS
  network, expected = (torch_sit.SiT(*arguments) for _ in range(2))
  torch_sit.load(network, params)
  theirs = network(*(torch.from_numpy(np.array(a)) for a in (x, t, labels)))
  np.testing.assert_allclose(velocity, theirs.detach(), rtol=1e-4, atol=1e-5)

  theirs.square().mean().backward()
  torch_sit.load(expected, gradients)
  pairs = zip(network.named_parameters(), expected.parameters(), strict=True)
  for (name, parameter), gradient in pairs:
    np.testing.assert_allclose(
      parameter.grad, gradient.detach(), rtol=1e-3, atol=1e-5, err_msg=name
    )
