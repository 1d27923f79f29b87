"""A whole SoftVQ-VAE: its state dict, values, training loss and gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.models import decoder
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.pretrained import (
  contract,
  released_softvq,
  vit,
  weight_reader,
)
from selfboottok_jax.stages import objective
from selfboottok_jax.stages import tokenizer as tokenizer_task
from selfboottok_jax.training import state as state_lib
from tests.golden import fixtures, rounding

pytestmark = pytest.mark.golden

NAME = 'tok02_tokenizer'
TEACHER = 'repa_model.'
# Checked by the first test; the second one checks all others.
VALUES = (
  'out_encoder_tokens',
  'out_z',
  'out_z_q',
  'out_indices',
  'out_post_quant',
  'out_recon',
  'out_recon_from_latent',
  'out_teacher_tokens',
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclasses.dataclass(frozen=True, eq=False)
class _Teacher:
  """The frozen teacher of the recorded model, on normalised images."""

  vit: vit.Vit
  params: Any
  name: str = 'recorded'

  @property
  def dim(self):
    return self.vit.width

  def __call__(self, params, images):
    mean, deviation = (
      jnp.asarray(row, jnp.float32)[None, None, None] for row in IMAGENET
    )
    x = (images * 0.5 + 0.5 - mean) / deviation
    return contract.Features(self.vit.apply({'params': params}, x).patches)


@pytest.fixture(scope='module')
def recorded():
  return fixtures.load('tokenizer', NAME)


@pytest.fixture(scope='module')
def model(recorded):
  """The recorded model; head counts are not in the state dict."""
  meta = recorded.meta
  fields = released_softvq.fields(
    recorded.weights, 'test', {'tau': meta['tau']}
  )
  assert fields['image_size'] == meta['image_size']
  assert fields['encoder_width'] == meta['embed_dim']
  return tokenizer_lib.Tokenizer(
    **fields | {'head_dim': meta['embed_dim'] // meta['num_heads']}
  )


@pytest.fixture(autouse=True)
def _heads(recorded, monkeypatch):
  """Heads as wide as no release has them: another width in the decoder."""
  heads = recorded.meta['dec_num_heads']
  plain = decoder.Decoder

  def build(*sizes, **options):
    *sizes, _ = sizes
    return plain(*sizes, heads, **options)

  monkeypatch.setattr(tokenizer_lib.Tokenizer, 'check', lambda self: None)
  monkeypatch.setattr(decoder, 'Decoder', build)


@pytest.fixture(scope='module')
def teacher(recorded):
  meta = recorded.meta
  side, width = meta['image_size'] // meta['patch_size'], meta['repa_dim']
  network = vit.Vit(
    (side, side), meta['patch_size'], width, meta['repa_depth'],
    meta['repa_heads'], 4 * width, layer_scale=True,
  )  # fmt: skip
  arrays = {
    name.removeprefix(TEACHER): array
    for name, array in recorded.weights.items()
    if name.startswith(TEACHER)
  }
  params = vit.read(arrays, network, vit.NAMINGS['timm'], 'test')
  return _Teacher(network, jax.tree.map(jnp.asarray, params))


def _images(recorded):
  return jnp.asarray(recorded.arrays['in_image'].transpose(0, 2, 3, 1))


def _check(recorded, values):
  for key, value in values.items():
    fixtures.check(NAME, key, value, recorded.arrays[key])


def test_every_recorded_value(recorded, model, teacher):
  params = released_softvq.read(recorded.weights, model, 'test')
  tapped = functools.partial(
    model.apply,
    capture_intermediates=lambda m, _: m.name in ('norm', 'from_code'),
  )
  apply = functools.partial(
    jax.jit(tapped, static_argnames='method'), {'params': params}
  )
  images = _images(recorded)
  output, state = apply(images)
  inside = state['intermediates']
  (tokens,) = inside['encoder']['norm']['__call__']
  (embedded,) = inside['decoder']['from_code']['__call__']
  latent = jnp.asarray(recorded.arrays['in_latent'])
  decoded, _ = apply(latent, method='decode')
  codes, _ = apply(images, method='encode')
  values = (
    tokens,
    output.tokens['global'],
    output.codes,
    output.quantized['global'].indices,
    embedded,
    output.reconstruction.transpose(0, 3, 1, 2),
    decoded[:1].transpose(0, 3, 1, 2),
    teacher(teacher.params, images).patches,
  )
  _check(recorded, dict(zip(VALUES, values, strict=True)))
  _check(recorded, {'out_z_q': codes})


def _task(meta, model, teacher):
  """The recorded objective: no LPIPS, no critic."""
  return tokenizer_task.TokenizerTask(
    model,
    objective.Objective(
      perceptual=0.0,
      adversarial=0.0,
      align=meta['repa_loss_weight'],
      repa_mode=meta['repa_align'],
      repa_input='quantized',
      projector_width=meta['repa_proj_dim'],
      kl=meta['entropy_loss_ratio'],
      kl_pool=True,
    ),
    {'repa_global': teacher},
    None,
    steps=1,
  )


def test_every_recorded_loss_and_gradient(recorded, model, teacher):
  meta, arrays = recorded.meta, recorded.arrays
  task = _task(meta, model, teacher)
  inputs = state_lib.LossInputs(
    params={}, frozen=task.frozen, batch={'image': _images(recorded)},
    stats={}, carry={}, step=jnp.zeros((), jnp.int32), rng=jax.random.key(0),
  )  # fmt: skip
  learns = [str(name) for name in arrays['out_grad_norm_names']]

  def loss(weights):
    reader = weight_reader.Reader(weights)
    params = released_softvq.assemble(reader, model)
    params[released_softvq.HEAD] = released_softvq.assemble_head(
      reader, model.token_dim, meta['repa_proj_dim'], teacher.dim
    )
    assert all(weights[n].shape == s for n, s in reader.wanted.items())
    return task.losses(0)['tokenizer'](params, inputs)

  # By the names of the file: where two arrays became one, each has its own.
  grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (total, outputs), gradients = grad({n: recorded.weights[n] for n in learns})
  norms = [np.linalg.norm(np.ravel(gradients[name])) for name in learns]
  actual = {
    'out_train_mse': outputs.metrics['loss/pixel'],
    'out_train_entropy_loss': meta['entropy_loss_ratio']
    * outputs.metrics['loss/kl'],
    'out_train_align_loss': meta['repa_loss_weight']
    * outputs.metrics['loss/repa_global'],
    'out_train_total': total,
    'out_grad_norms': np.asarray(norms),
    **{
      key: gradients[key.removeprefix('out_grad/')]
      for key in arrays
      if key.startswith('out_grad/')
    },
  }
  outputs = {key for key in arrays if key.startswith('out_')}
  assert outputs == {*VALUES, *actual, 'out_grad_norm_names'}
  array = 'out_train_align_loss'
  error = meta['repa_loss_weight'] * _alignment_error(meta)
  label, loss = f'{NAME}:{array}', actual.pop(array)
  fixtures.check_rounding(label, loss, arrays[array], error)
  # The loss has a sign, and a weight.
  assert fixtures.excess(-loss, arrays[array], error) > 100
  _check(recorded, actual)


def _alignment_error(meta):
  """Bounds the cosine's error through encoder, code layers and projector."""
  patch = 3 * meta['patch_size'] ** 2
  tokens = (meta['image_size'] // meta['patch_size']) ** 2
  tokens += meta['num_latent_tokens'] + 1
  return rounding.mean_cosine(
    meta['repa_dim'],
    patch,
    *rounding.transformer(meta['embed_dim'], tokens, meta['depth']),
    # To the code, codes of unit norm and their mean, and back.
    meta['embed_dim'],
    meta['codebook_embed_dim'],
    meta['codebook_embed_dim'],
    meta['codebook_size'],
    meta['codebook_embed_dim'],
    # The projector.
    meta['embed_dim'],
    meta['repa_proj_dim'],
    meta['repa_proj_dim'],
  )
