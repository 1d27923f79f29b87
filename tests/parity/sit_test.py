import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selfboottok_jax.models import layers, sit
from selfboottok_jax.objectives import alignment
from tests import tiny
from tests.parity import torch_parts, torch_sit, torch_steps

B, K, E, CLASSES, WIDTH, DEPTH, HEADS = 3, 8, 4, 5, 32, 3, 4
REG = {'cls_dim': 6, 'align_dim': 6, 'align_depth': 2, 'projector_width': 16}


@pytest.mark.parametrize('fields', [{}, REG], ids=['sit', 'reg'])
def test_velocity_and_gradients_are_those_of_torch(fields):
  arguments = K, E, CLASSES, WIDTH, DEPTH, HEADS
  # What training does, but that labels stay.
  model = sit.SiT(*arguments, **fields, label_dropout=0.0)
  keys = jax.random.split(jax.random.key(0), 6)
  x = jax.random.normal(keys[0], (B, K, E))
  t = jax.random.uniform(keys[1], (B,))
  labels = jnp.array([0, 3, CLASSES])
  inputs = [x, t, labels]
  if fields:
    inputs.append(jax.random.normal(keys[3], (B, 6)))
  params = tiny.awake(model.init(keys[2], *inputs))['params']
  targets = 0.1 * jax.random.normal(keys[4], (B, K, 6))
  cls_target = jax.random.normal(keys[5], (B, 6))

  def loss(params):
    output = model.apply(
      {'params': params}, *inputs, train=True, rngs={'dropout': keys[0]}
    )
    total = jnp.mean(output.tokens**2)
    if fields:
      total += jnp.mean(output.cls**2) + alignment.entangled_loss(
        targets, output.aligned, cls_target, output.aligned_cls
      )
    return total, output

  (value, output), gradients = jax.value_and_grad(loss, has_aux=True)(params)

  network, expected = (torch_sit.SiT(*arguments, **fields) for _ in range(2))
  torch_parts.load(network, params)
  theirs = network(*_torch(inputs))
  total = theirs.tokens.square().mean()
  _check(output.tokens, theirs.tokens)
  if fields:
    _check(output.cls, theirs.cls)
    _check(output.aligned_cls, theirs.aligned[:, 0])
    _check(output.aligned, theirs.aligned[:, 1:])
    total = total + theirs.cls.square().mean()
    total = total + torch_steps.aligned_loss(
      theirs.aligned, *_torch([cls_target, targets])
    )
  np.testing.assert_allclose(value, total.item(), rtol=1e-5)

  total.backward()
  torch_parts.load(expected, gradients)
  pairs = zip(network.named_parameters(), expected.parameters(), strict=True)
  for (name, parameter), gradient in pairs:
    np.testing.assert_allclose(
      parameter.grad, gradient.detach(), rtol=1e-3, atol=1e-5, err_msg=name
    )


def test_positions():
  for width in (8, 7):
    table = torch_sit.sincos_1d(5, width)
    np.testing.assert_allclose(table, layers.sincos_1d(5, width), atol=1e-6)


def _torch(arrays):
  return [torch.from_numpy(np.array(array)) for array in arrays]


def _check(ours, theirs):
  np.testing.assert_allclose(ours, theirs.detach(), rtol=1e-4, atol=1e-5)
