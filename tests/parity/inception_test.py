"""Inception-v3 beside pytorch-fid's at true width, on random weights.

torch-fidelity's resize is that of the recorded runs in tests/golden.
"""

import jax
import numpy as np
import pytest
import torch
import torchvision
from pytorch_fid import inception as theirs

from selfboottok_jax.pretrained import inception
from tests.parity import public
from tests.pretrained import weights as weights_lib


def _plain():
  """torchvision's network, whose pools are others."""
  return torchvision.models.inception_v3(
    weights=None, num_classes=1008, aux_logits=False, init_weights=False
  )


@pytest.fixture(scope='module')
def weights():
  """Random numbers by the names and shapes that we say the file has."""
  arrays = public.state_dict(public.randomise(_plain()))
  assert {name: array.shape for name, array in arrays.items()} == dict(
    weights_lib.wanted(inception.assemble)
  )
  return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope='module')
def measured(weights):
  """Returns images, and every output of the network that scores read."""
  network = inception.Inception('half_pixel')
  arrays = {name: array.numpy() for name, array in weights.items()}
  params = network.read(arrays, 'test')
  images = public.images(2, 64, 80)
  return images, jax.jit(network.measure)(params, images)


def test_every_block_of_pytorch_fid(weights, measured, monkeypatch):
  monkeypatch.setattr(
    theirs, 'load_state_dict_from_url', lambda *_, **__: weights
  )
  model = theirs.InceptionV3([0, 1, 2, 3]).eval()
  images, ours = measured
  with torch.no_grad():
    # It wants [0, 1].
    blocks = model((public.to_torch(images) + 1) / 2)
  for expected, width in zip(blocks, inception.POOLED_AFTER, strict=True):
    stage = inception.POOLED_AFTER[width]
    pooled = expected.mean(dim=(2, 3))
    public.check(ours.pooled[width], pooled, f'mean after {stage}')
    if width < 2048:
      public.check(ours.activations[stage], expected, stage)


def test_classifier(weights, measured, monkeypatch):
  monkeypatch.setattr(
    theirs, 'load_state_dict_from_url', lambda *_, **__: weights
  )
  model = theirs.fid_inception_v3().eval()
  images, ours = measured
  with torch.no_grad():
    x = torch.nn.functional.interpolate(
      public.to_torch(images), (299, 299), mode='bilinear', align_corners=False
    )
    logits = model(x)
  public.check(ours.logits, logits, 'logits')


def test_plain_torchvision_would_be_seen(weights, measured):
  model = _plain().eval()
  model.load_state_dict(weights)
  images, ours = measured
  with torch.no_grad():
    x = torch.nn.functional.interpolate(
      public.to_torch(images), (299, 299), mode='bilinear', align_corners=False
    )
    logits = model(x)
  error = public.relative_error(ours.logits, logits)
  assert error > 5 * public.TOLERANCE


def test_the_other_resize_would_be_seen(weights, measured):
  images, ours = measured
  network = inception.Inception('tf1')
  arrays = {name: array.numpy() for name, array in weights.items()}
  params = network.read(arrays, 'test')
  other = jax.jit(network.__call__)(params, images).cls
  difference = np.linalg.norm(other - ours.pooled[2048])
  assert difference > 0.01 * np.linalg.norm(ours.pooled[2048])
