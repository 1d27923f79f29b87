"""Turns a released generator into a run: SiT, REPA, REG, LightningDiT, SoftVQ.

  python -m launch.import_generator --network=sit_xl2:FILE --workdir=runs/sit
  python -m launch.sample --workdir=runs/sit --tokenizer=sdvae --out=samples

The network is one of `released_generators.RELEASED`, or one of these with a
source: NAME:FILE, NAME:FOLDER, NAME:ORG/REPO. A source may be of another size.
Sampling, scoring and fine-tuning take the workdir like that of any generator.
"""

from typing import Any

import jax.numpy as jnp
import ml_collections

from launch import cli
from selfboottok_jax import errors, files, inference, trees
from selfboottok_jax.models import sit
from selfboottok_jax.presets import generator as generator_config
from selfboottok_jax.pretrained import (
  autoencoder,
  released_generators,
  sit_weights,
  weight_files,
)
from selfboottok_jax.stages import imports

FLAGS = cli.Flags()
_NETWORK = FLAGS.string('network', '', 'NAME or NAME:SOURCE.')
_WORKDIR = FLAGS.string('workdir', '', 'Where the run is written.')
_TOKENIZER = FLAGS.string(
  'tokenizer', '', 'Run or autoencoder of its codes, if not the published.'
)
_HEADS = FLAGS.integer(
  'heads', 0, 'Attention heads, of a width that none was published of.'
)

# Fields of the module that are no keys of `config.model`.
_NOT_MODEL = {'num_tokens', 'token_dim', 'num_classes', 'parent', 'name'}


def main() -> None:
  """Imports what the flags say."""
  spec, workdir = _NETWORK.value, _WORKDIR.value
  cli.require(network=spec, workdir=workdir)
  files.check_folder('workdir', workdir)
  released = released_generators.RELEASED
  places = {name: kind.published for name, kind in released.items()}
  (weights,) = imports.find(spec, places)
  kind = released[spec.partition(':')[0]]
  cli.start_jax()
  arrays = weight_files.read(weights)
  model = build(arrays, kind, str(weights))
  tokenizer = _TOKENIZER.value or kind.tokenizer
  fingerprint, image_size = identify(tokenizer, model)
  params = sit_weights.read(arrays, model, kind.family, str(weights))
  config = configure(kind, model, tokenizer, image_size)
  one = jnp.ones(model.token_dim)
  imports.write_run(
    workdir,
    config,
    'generator',
    params,
    {'network': spec, 'weights': trees.weights_hash(params)},
    stats={'latents': {'mean': kind.mean * one, 'std': kind.std * one}},
    class_names=[str(label) for label in range(model.num_classes)],
    tokenizer_fingerprint=fingerprint,
  )
  cli.say(
    f'{workdir}: {trees.count(params) / 1e6:.1f}M parameters, '
    f'{model.num_tokens} tokens of {model.token_dim}, {model.num_classes} '
    f'classes; sampled by {inference.Sampling(**config["sampling"]).describe()}'
  )


def build(
  arrays: dict[str, Any], kind: released_generators.Generator, source: str
) -> sit.SiT:
  """The module of a state dict, in 32 bits as the published numbers are."""
  fields = released_generators.fields(
    arrays, kind.family, source, heads=_HEADS.value
  )
  # Where tokens are aligned no array tells; it goes by the size.
  depths = {
    size['width']: size['align_depth']
    for size in generator_config.SIZES.values()
  }
  depth = depths.get(fields['width'], fields['depth'])
  return sit.SiT(**fields, align_depth=min(depth, fields['depth']))


def identify(tokenizer: str, model: sit.SiT) -> tuple[str, int]:
  """The fingerprint of the codes' tokenizer, and the side of its images.

  An autoencoder is not loaded for it.

  Raises:
    ConfigError: none is named, or one of other codes.
  """
  if not tokenizer:
    raise errors.ConfigError(
      '--tokenizer not given; wanted the run of the tokenizer that this '
      'generator was trained on, as launch.import_softvq makes it'
    )
  if autoencoder.is_autoencoder(tokenizer):
    side = round(model.num_tokens**0.5)
    size = side * autoencoder.PATCH_SIZE
    network = autoencoder.load_network(tokenizer, size, abstract=True)
    shape = network.side**2, network.dim
    found = autoencoder.fingerprint(network.name, size), size
  else:
    loaded = inference.load_tokenizer(tokenizer)
    shape = loaded.num_tokens, loaded.token_dim
    found = loaded.fingerprint, loaded.image_size
  if shape != (model.num_tokens, model.token_dim):
    raise errors.ConfigError(
      f'--tokenizer={tokenizer} makes {shape[0]} tokens of {shape[1]}, and the '
      f'network is of {model.num_tokens} of {model.token_dim}; name the '
      'tokenizer that it was trained on'
    )
  return found


def configure(
  kind: released_generators.Generator,
  model: sit.SiT,
  tokenizer: str,
  image_size: int,
) -> dict[str, Any]:
  """The configuration of its training, as far as it is known."""
  config = generator_config.get_config(kind.preset)
  config.update_from_flattened_dict(dict(kind.changes))
  config.tokenizer = tokenizer
  config.data.image_size = image_size
  names = set(sit.SiT.__dataclass_fields__) - _NOT_MODEL
  config.model = ml_collections.ConfigDict(
    {name: getattr(model, name) for name in sorted(names)}
  )
  return config.to_dict()


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
