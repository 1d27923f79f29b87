"""ConvNeXt-T beside timm's, on random weights."""

import jax
import timm
import torch

from selfboottok_jax.pretrained import convnext
from tests.parity import public


def test_features_are_those_of_timm():
  model = public.randomise(timm.create_model('convnext_tiny'))
  network = convnext.ConvNext('convnext_t', image_size=64)
  images = public.images(2, 64, 64)
  mean, deviation = (
    torch.tensor(s).reshape(3, 1, 1)
    for s in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
  )
  x = ((public.to_torch(images) + 1) / 2 - mean) / deviation
  with torch.no_grad():
    last = model.forward_features(x)
    pooled = model.forward_head(last, pre_logits=True)
  params = network.read(public.state_dict(model), 'test')
  ours = jax.jit(network)(params, images)
  public.check(ours.patches, last.flatten(2).transpose(1, 2))
  public.check(ours.cls, pooled)
