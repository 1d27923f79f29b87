"""The DINOv2-B that training reads, beside timm's, on random weights.

The release has patches of 14 pixels on a grid of 37 x 37; teachers have 16
pixels on 16 x 16, which timm's own functions bring it to.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import timm
import torch
from timm.models import vision_transformer as timm_vit

from selfboottok_jax.pretrained import resample, vision
from tests.parity import public

NAME, NATIVE, SIDE, PATCH, GRID = 'vit_base_patch14_dinov2', 518, 256, 16, 16
SIZES = [(SIDE, SIDE), (200, 330)]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope='module')
def release() -> dict[str, np.ndarray]:
  """Random numbers by the names and shapes of the official file."""
  model = timm.create_model(NAME, img_size=NATIVE, num_classes=0)
  arrays = public.state_dict(public.randomise(model))
  assert arrays['pos_embed'].shape == (1, 1 + 37 * 37, 768)
  assert arrays['patch_embed.proj.weight'].shape == (768, 3, 14, 14)
  return arrays | {'mask_token': np.zeros((1, 768), np.float32)}


@pytest.fixture(scope='module')
def model(release):
  """Fills a model as `timm.create_model(..., pretrained=True)` does."""
  network = timm.create_model(
    NAME, img_size=SIDE, patch_size=PATCH, num_classes=0
  )
  state = {name: torch.from_numpy(array) for name, array in release.items()}
  network.load_state_dict(timm_vit.checkpoint_filter_fn(state, network))
  return network.eval()


@pytest.fixture(scope='module')
def theirs(model):
  """Class token and patches of images of any size, with torch's resize."""

  @functools.cache
  @torch.no_grad()
  def run(size):
    x = public.to_torch(public.images(2, *size))
    x = torch.nn.functional.interpolate(x, (SIDE, SIDE), mode='bicubic')
    mean, deviation = (
      torch.tensor(s).reshape(3, 1, 1) for s in (MEAN, DEVIATION)
    )
    tokens = model.forward_features(((x + 1) / 2 - mean) / deviation)
    return tokens[:, 0], tokens[:, 1:]

  return run


def _network(**fields):
  """Builds the network of a 256-pixel tokenizer; `fields` change its family."""
  network = vision.build('dinov2_b', grid=GRID)
  assert network.vit.patch_size == PATCH
  return dataclasses.replace(
    network, family=dataclasses.replace(network.family, **fields)
  )


def _ours(network, release, size):
  params = network.read(release, 'test')
  return jax.jit(network)(params, public.images(2, *size))


def test_weights_are_resampled_as_timm_does(release, model):
  params = _network().read(release, 'test')
  state = model.state_dict()
  kernel = state['patch_embed.proj.weight'].permute(2, 3, 1, 0)
  ours = params['patch_embed']['kernel']
  public.check(ours, kernel.reshape(-1, 768), 'patch embedding')
  table = state['pos_embed']
  public.check(params['positions'], table[:, 1:], 'positions')
  # Ours has its position added already.
  cls = state['cls_token'] + table[:, :1]
  public.check(params['cls'], cls, 'class token')


@pytest.mark.parametrize('size', SIZES)
def test_features_are_those_of_timm(release, theirs, size):
  ours, (cls, patches) = _ours(_network(), release, size), theirs(size)
  public.check(ours.patches, patches, 'patches')
  public.check(ours.cls, cls, 'class token')


@pytest.mark.parametrize('mistake', ['positions', 'statistics', 'images'])
def test_a_mistake_would_be_seen(release, theirs, mistake, monkeypatch):
  fields = {
    'positions': {'antialias': False},
    'statistics': {'statistics': vision.HALF},
  }.get(mistake, {})
  if mistake == 'images':
    smooth = functools.partial(resample.resize_images, antialias=True)
    monkeypatch.setattr(resample, 'resize_images', smooth)
  size = SIZES[1]
  ours = _ours(_network(**fields), release, size)
  assert public.relative_error(ours.patches, theirs(size)[1]) > 1e-4
