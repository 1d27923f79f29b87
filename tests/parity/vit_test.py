"""Vision transformers beside their public classes, on random weights."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from timm.models import vision_transformer as timm_vit

from selfboottok_jax.models import layers
from selfboottok_jax.pretrained import vit
from tests.parity import public

WIDTH, DEPTH, HEADS, PATCH, GRID = 48, 3, 4, 4, 5
_SIZES = {
  'hidden_size': WIDTH,
  'num_hidden_layers': DEPTH,
  'num_attention_heads': HEADS,
  'image_size': PATCH * GRID,
  'patch_size': PATCH,
}


@dataclasses.dataclass(frozen=True)
class Output:
  """Outputs of a public class: after some blocks, patches, one vector."""

  hidden: dict[int, Any]
  patches: Any
  summary: Any


@dataclasses.dataclass(frozen=True)
class Family:
  """Ours and theirs of one kind.

  Attributes:
    naming: key of `vit.NAMINGS`.
    fields: of `vit.Vit`, but for sizes.
    build: the public model.
    options: of its call.
    prefix: of the names in published files, which hold more than this model.
    scale: of ours between blocks, where the public class has another epsilon.
  """

  naming: str
  fields: dict[str, Any]
  build: Callable[[], Any]
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  prefix: str = ''
  scale: float = 1.0


def _dinov2(**sizes):
  return transformers.Dinov2Model(
    transformers.Dinov2Config(mlp_ratio=4, **_SIZES | sizes)
  )


def _dinov2_registers():
  return transformers.Dinov2WithRegistersModel(
    transformers.Dinov2WithRegistersConfig(
      mlp_ratio=4, num_register_tokens=4, **_SIZES
    )
  )


def _ijepa():
  config = transformers.IJepaConfig(
    intermediate_size=4 * WIDTH, layer_norm_eps=1e-6, **_SIZES
  )
  return transformers.IJepaModel(config, add_pooling_layer=False)


def _siglip():
  return transformers.SiglipVisionModel(
    transformers.SiglipVisionConfig(intermediate_size=4 * WIDTH, **_SIZES)
  )


def _timm(**fields):
  return timm_vit.VisionTransformer(
    PATCH * GRID,
    PATCH,
    num_classes=0,
    embed_dim=WIDTH,
    depth=DEPTH,
    num_heads=HEADS,
    dynamic_img_size=True,
    **fields,
  )


def _clip():
  return _timm(
    pre_norm=True,
    norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-5),
    act_layer='quick_gelu',
  )


_ANY_SIZE = {'interpolate_pos_encoding': True}
FAMILIES = {
  'dinov2': Family('dinov2', {'layer_scale': True}, _dinov2),
  'dinov2_registers': Family(
    'dinov2_registers', {'layer_scale': True, 'registers': 4}, _dinov2_registers
  ),
  'ijepa': Family('ijepa', {'cls': False}, _ijepa, _ANY_SIZE),
  'siglip': Family(
    'siglip',
    {'cls': False, 'gelu': 'tanh', 'pool': True},
    _siglip,
    _ANY_SIZE,
    'vision_model.',
  ),
  # DINO's releases are of timm's layout, and MAE's.
  'timm': Family('timm', {}, _timm),
  'clip': Family(
    'clip',
    {'pre_norm': True, 'gelu': 'quick'},
    _clip,
    scale=0.1**0.5,
  ),
}


def _theirs(model, pixels, options, count):
  """Runs a class of transformers or of timm."""
  pixels = public.to_torch(pixels)
  with torch.no_grad():
    if isinstance(model, timm_vit.VisionTransformer):
      last, hidden = model.forward_intermediates(
        pixels, return_prefix_tokens=True, output_fmt='NLC'
      )
      blocks = [torch.cat([first, x], dim=1) for x, first in hidden]
      return Output(dict(enumerate(blocks, 1)), last[:, -count:], last[:, 0])
    output = model(pixels, output_hidden_states=True, **options)
  last = output.last_hidden_state
  return Output(
    dict(enumerate(output.hidden_states)),
    last[:, -count:],
    last[:, 0] if len(last[0]) > count else output.get('pooler_output'),
  )


def _arrays(model, family, folder):
  if isinstance(model, timm_vit.VisionTransformer):
    return public.state_dict(model)
  arrays = public.saved(model, folder)
  return {family.prefix + name: array for name, array in arrays.items()}


def _ours(family, arrays, pixels, native, sizes, **fields):
  """Our output on pixels, from weights for a square grid of `native`."""
  p, width, depth, heads = sizes
  grid = tuple(side // p for side in pixels.shape[1:3])
  network = vit.Vit(
    grid, p, width, depth, heads, 4 * width,
    taps=(1, depth - 1), **family.fields | fields,
  )  # fmt: skip
  params = vit.read(
    arrays, network, vit.NAMINGS[family.naming], 'test', grid=(native, native)
  )
  return jax.jit(network.apply)({'params': params}, pixels)


TINY = PATCH, WIDTH, DEPTH, HEADS


def _check(ours, theirs, scale=1.0):
  for block, tokens in ours.hidden.items():
    public.check(tokens, scale * theirs.hidden[block], f'after block {block}')
  public.check(ours.patches, theirs.patches, 'patches')
  assert (ours.summary is None) == (theirs.summary is None)
  if ours.summary is not None:
    public.check(ours.summary, theirs.summary, 'summary')


# Of the grid that the weights are for, and of one with another table.
@pytest.mark.parametrize('grid', [(GRID, GRID), (7, 4)])
@pytest.mark.parametrize('name', list(FAMILIES))
def test_tiny(name, grid, tmp_path):
  family = FAMILIES[name]
  model = public.randomise(family.build())
  pixels = public.images(2, grid[0] * PATCH, grid[1] * PATCH)
  theirs = _theirs(model, pixels, family.options, grid[0] * grid[1])
  arrays = _arrays(model, family, tmp_path)
  _check(_ours(family, arrays, pixels, GRID, TINY), theirs, family.scale)


def test_dinov2_b_of_another_grid(tmp_path):
  """True width, 37 x 37 positions for 16 x 16 patches of 14 pixels."""
  model = public.randomise(
    _dinov2(
      hidden_size=768,
      num_hidden_layers=12,
      num_attention_heads=12,
      image_size=518,
      patch_size=14,
    )
  )
  pixels = public.images(2, 224, 224)
  theirs = _theirs(model, pixels, {}, 256)
  family = FAMILIES['dinov2']
  arrays = _arrays(model, family, tmp_path)
  del model
  _check(_ours(family, arrays, pixels, 37, (14, 768, 12, 12)), theirs)


@pytest.mark.parametrize(
  'mistake', ['gelu', 'epsilon', 'positions', 'attention']
)
def test_a_mistake_would_be_seen(mistake, tmp_path, monkeypatch):
  family = FAMILIES['dinov2']
  model = public.randomise(family.build())
  pixels = public.images(2, 7 * PATCH, 4 * PATCH)
  arrays = _arrays(model, family, tmp_path)
  fields = {'gelu': 'tanh'} if mistake == 'gelu' else {}
  if mistake == 'epsilon':
    monkeypatch.setattr(layers, 'LAYER_NORM_EPSILON', 1e-5)
  if mistake == 'positions':
    family = dataclasses.replace(family, naming='dinov2_registers')
  if mistake == 'attention':
    arrays = {
      name: np.zeros_like(array) if '.query.' in name else array
      for name, array in arrays.items()
    }
  theirs = _theirs(model, pixels, {}, 28)
  ours = _ours(family, arrays, pixels, GRID, TINY, **fields)
  error = public.relative_error(ours.patches, theirs.patches)
  assert error > 5 * public.TOLERANCE
