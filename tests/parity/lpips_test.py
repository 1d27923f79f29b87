"""LPIPS beside the `lpips` package at true width, on random weights."""

import jax
import lpips as package
import numpy as np
import pytest
import torch

from selfboottok_jax.pretrained import lpips
from tests.parity import public
from tests.pretrained import weights

pytestmark = pytest.mark.filterwarnings(
  # The package asks for no weights in torchvision's old words.
  "ignore:The parameter 'pretrained' is deprecated",
  'ignore:Arguments other than a weight enum',
)


def _theirs(net):
  """Random trunk and heads: nothing is downloaded."""
  model = package.LPIPS(
    pretrained=False, pnet_rand=True, net=net, verbose=False
  )
  model = public.randomise(model)
  for name, parameter in model.named_parameters():
    if name.startswith('lin'):
      parameter.abs_()
  return model


def _ours(model, net):
  arrays = {
    name: array
    for name, array in public.state_dict(model).items()
    # Constants of the code.
    if not name.startswith('scaling_layer')
  }
  return weights.lpips_of(arrays, lpips.BACKBONES[net](), net)


# Odd sides are included, where pooling windows overhang.
@pytest.mark.parametrize(
  ('net', 'size'),
  [('vgg', (64, 64)), ('alex', (64, 75)), ('squeeze', (64, 75))],
)
def test_features_and_distances(net, size):
  model = _theirs(net)
  network = _ours(model, net)
  a, b = public.images(2, *size), public.images(2, *size, seed=1)
  with torch.no_grad():
    _, shares = model(public.to_torch(a), public.to_torch(b), retPerLayer=True)
    taps = model.net(model.scaling_layer(public.to_torch(a)))
  normalised = public.from_torch(model.scaling_layer(public.to_torch(a)))
  ours = jax.jit(network.backbone.taps)(network.params, normalised)
  for index, (tap, expected) in enumerate(zip(ours, taps, strict=True)):
    public.check(tap, expected, f'tap {index}')
  ours = jax.jit(network.per_layer)(network.params, a, b)
  assert np.asarray(ours).min() > 0
  for index, share in enumerate(shares):
    public.check(ours[:, index], share.reshape(-1), f'share {index}')


def test_gradient_of_vgg():
  model = _theirs('vgg')
  network = _ours(model, 'vgg')
  a, b = public.images(2, 32, 32), public.images(2, 32, 32, seed=1)

  @jax.jit
  @jax.grad
  def gradient(x, other):
    return network(network.params, other, x).sum()

  ours = gradient(b, a)
  leaf = public.to_torch(b).requires_grad_()
  model(public.to_torch(a), leaf).sum().backward()
  # A unit at zero may fall on either side of the ReLU.
  assert public.relative_error(ours, leaf.grad) < 1e-3
