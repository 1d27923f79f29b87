"""Recorded networks as ours: their arguments, state dicts and images."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from selfboottok_jax.models import layers, sit
from selfboottok_jax.pretrained import released_generators, weight_reader
from tests.golden import records


@dataclasses.dataclass(frozen=True)
class Network:
  """A module, and its arrays: by their names there, and as imported."""

  model: sit.SiT
  form: released_generators.FileForm
  weights: dict[str, Any]
  imported: dict[str, Any]

  def params(self, weights: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parameters of `weights`, traceable; of the record's by default."""
    weights = self.weights if weights is None else weights

    reader = weight_reader.Reader(weights)
    params = released_generators.assemble(reader, self.model, self.form)
    assert all(weights[n].shape == s for n, s in reader.wanted.items())
    return params

  def apply(self, *inputs, weights=None, **options) -> sit.SiTOutput:
    """In our convention, on tokens."""
    variables = {'params': self.params(weights)}
    return self.model.apply(variables, *inputs, **options)

  def velocity(self, x, t, labels):
    """Velocity of the tokens of a generator without a class token."""
    return self.apply(x, t, labels).tokens

  def tokens(self, images):
    """[b, c, h, w] to [b, k, e]."""
    images = jnp.moveaxis(jnp.asarray(images), 1, -1)
    return layers.patchify(images, self.form.patch_size)

  def images(self, tokens):
    """Inverse of `tokens`."""
    images = layers.unpatchify(tokens, self.form.patch_size)
    return jnp.moveaxis(images, -1, 1)

  def first_channels(self, count: int, scale: float):
    """A scale of guidance for so many channels of a latent, 1 for the rest."""
    channels = self.model.token_dim // self.form.patch_size**2
    guided = jnp.arange(self.model.token_dim) % channels < count
    return jnp.where(guided, scale, 1.0)


def load(record: records.Record, family: str, **changes) -> Network:
  """The network of a record, read as released files are.

  `changes` are of the module's fields; of a record with several projectors,
  'projector' is the one to take.
  """
  args, weights = record.meta['model_args'], dict(record.weights)
  if 'projector' in changes:
    weights = only_projector(weights, changes.pop('projector'))
  fields = released_generators.fields(
    weights, family, record.name, heads=args['num_heads']
  )
  fields['align_depth'] = args.get('encoder_depth', args['depth'])
  model = sit.SiT(**fields | {'label_dropout': 0.0} | changes)
  return Network(
    model,
    released_generators.form_of(weights, model, family),
    {name: jnp.asarray(array) for name, array in weights.items()},
    released_generators.read(weights, model, family, record.name),
  )


def only_projector(weights: dict[str, Any], index: int) -> dict[str, Any]:
  """A state dict whose one projector is the `index`th."""
  prefix = f'projectors.{index}.'
  return {
    name.replace(prefix, 'projectors.0.'): array
    for name, array in weights.items()
    if not name.startswith('projectors.') or name.startswith(prefix)
  }


def integers(array: np.ndarray):
  """Labels as ours are."""
  return jnp.asarray(array.astype(np.int32))
