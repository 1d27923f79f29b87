"""Imports released generators and tokenizers as runs, at step 0."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jaxtyping import PyTree

from selfboottok_jax import (
  errors,
  files,
  inference,
  pretrained,
  sizes,
  trees,
)
from selfboottok_jax.inference.generator import CODE_STATISTICS
from selfboottok_jax.models import sit
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.presets import generator as generator_presets
from selfboottok_jax.pretrained import (
  autoencoders,
  contract,
  released_generators,
  released_softvq,
  store,
  weight_files,
)
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import state as state_lib

# Fields of the modules that are no keys of `config.model`: flax's own, and
# sizes that follow from images or codes.
_NOT_OF_TOKENIZER = {'parent', 'name', 'image_size'}
_NOT_OF_GENERATOR = {'parent', 'name', 'num_tokens', 'token_dim', 'num_classes'}


@dataclasses.dataclass(frozen=True)
class ImportedRun:
  """A run that was imported.

  Attributes:
    model: its module.
    num_parameters: number of its parameters.
    config: configuration of its training, as far as it is known.
  """

  model: Any
  num_parameters: int
  config: Mapping[str, Any]


def import_generator(
  spec: str, workdir: str, *, tokenizer: str = '', heads: int = 0
) -> ImportedRun:
  """Turns a released generator into a run.

  Args:
    spec: 'NAME' of `released_generators.RELEASED` or 'NAME:SOURCE', see
      `pretrained.sources`. A source may be of another size.
    workdir: folder of the run.
    tokenizer: workdir or autoencoder of its codes; '' for the published one.
    heads: number of attention heads, for a width that nobody published.

  Raises:
    ConfigError: an unknown network, no tokenizer, or one of other codes.
    WeightsError: no such source, or a file of another network.
    CheckpointError: the workdir holds another run.
  """
  files.check_folder('workdir', workdir)
  released = released_generators.RELEASED
  places = {name: kind.published for name, kind in released.items()}
  (weights,) = _fetch(spec, places)
  kind, source = released[spec.partition(':')[0]], str(weights)
  arrays = weight_files.read(weights)
  model = _generator_module(arrays, kind, source, heads)
  tokenizer = tokenizer or kind.tokenizer
  fingerprint, image_size = _identify_tokenizer(tokenizer, model)
  params = released_generators.read(arrays, model, kind.family, source)
  config = generator_presets.get_config(kind.preset)
  config.update_from_flattened_dict(dict(kind.changes))
  config.tokenizer = tokenizer
  config.data.image_size = image_size
  config.model = ml_collections.ConfigDict(
    _model_config(model, _NOT_OF_GENERATOR)
  )
  one = jnp.ones(model.token_dim)
  _write_run(
    workdir,
    config.to_dict(),
    'generator',
    params,
    {'network': spec, 'weights': trees.weights_hash(params)},
    stats={CODE_STATISTICS: {'mean': kind.mean * one, 'std': kind.std * one}},
    class_names=[str(label) for label in range(model.num_classes)],
    tokenizer_fingerprint=fingerprint,
  )
  return ImportedRun(model, trees.count(params), config.to_dict())


def import_softvq(spec: str, workdir: str) -> ImportedRun:
  """Turns a released SoftVQ-VAE into a run.

  Args:
    spec: 'NAME' of `released_softvq.RELEASED` or 'NAME:SOURCE', see
      `pretrained.sources`. A source may be of another size.
    workdir: folder of the run.

  Raises:
    ConfigError: an unknown network.
    WeightsError: no such source, or a file of another network.
    CheckpointError: the workdir holds another run.
  """
  files.check_folder('workdir', workdir)
  weights, settings_file = _fetch(
    spec, released_softvq.RELEASED, released_softvq.SETTINGS
  )
  arrays, settings = weight_files.read(weights), _read_settings(settings_file)
  model = tokenizer_lib.Tokenizer(
    **released_softvq.fields(arrays, str(weights), settings)
  )
  model.check()
  params = released_softvq.read(arrays, model, str(weights))
  own = tokenizer_lib.model_params(params)
  config = {
    'task': 'tokenizer',
    'data': {'source': 'auto', 'path': '', 'image_size': model.image_size},
    'model': _model_config(model, _NOT_OF_TOKENIZER),
  }
  _write_run(
    workdir,
    config,
    'tokenizer',
    params,
    {'network': spec, 'weights': trees.weights_hash(own)},
    class_names=[],
  )
  return ImportedRun(model, trees.count(own), config)


def _fetch(
  spec: str,
  released: Mapping[str, contract.Published | None],
  *beside: str,
) -> tuple[pathlib.Path, ...]:
  """Finds the one weight file of a released network, and files beside it."""
  name, _, source = spec.partition(':')
  if name not in released:
    example = next(iter(released))
    raise errors.ConfigError(
      f'--network={spec}; wanted one of {", ".join(released)}, or with a '
      f'source, as {example}:FILE, {example}:FOLDER or {example}:ORG/REPO'
    )
  found = store.fetch(name, source, released[name], *beside)
  count = len(found) - len(beside)
  if count > 1:
    raise errors.WeightsError(
      f'--network={spec} names {count} files; wanted the one that holds the '
      'whole state dict'
    )
  return found


def _generator_module(
  arrays: Mapping[str, Any],
  kind: released_generators.Generator,
  source: str,
  heads: int,
) -> sit.SiT:
  """Builds the float32 SiT whose sizes are read off a state dict's arrays."""
  fields = released_generators.fields(arrays, kind.family, source, heads=heads)
  # No array reveals the depth of the alignment; it goes by the size.
  depths = {
    size['width']: size['align_depth']
    for size in generator_presets.SIZES.values()
  }
  depth = depths.get(fields['width'], fields['depth'])
  return sit.SiT(**fields, align_depth=min(depth, fields['depth']))


def _identify_tokenizer(spec: str, model: sit.SiT) -> tuple[str, sizes.Size]:
  """The fingerprint of the codes' tokenizer, and the size of its images.

  The weights of an autoencoder are not loaded for it.

  Raises:
    ConfigError: none is named, or one of other codes.
  """
  if not spec:
    raise errors.ConfigError(
      '--tokenizer not given; wanted the run of the tokenizer that this '
      'generator was trained on, as launch.import_softvq makes it'
    )
  if autoencoders.is_autoencoder(spec):
    # Nothing that is released is of other images than squares.
    size: sizes.Size = math.isqrt(model.num_tokens) * autoencoders.PATCH_SIZE
    network = pretrained.load_latents(spec, size, abstract=True)
    shape = math.prod(network.shape), network.dim
    found = autoencoders.fingerprint(network.name, size), size
  else:
    loaded = inference.load_tokenizer(spec)
    shape = loaded.num_tokens, loaded.token_dim
    found = loaded.fingerprint, loaded.image_size
  if shape != (model.num_tokens, model.token_dim):
    raise errors.ConfigError(
      f'--tokenizer={spec} makes {shape[0]} tokens of {shape[1]}, and the '
      f'network is of {model.num_tokens} of {model.token_dim}; name the '
      'tokenizer that it was trained on'
    )
  return found


def _model_config(model: Any, absent: set[str]) -> dict[str, Any]:
  """All fields but `absent`, so that the defaults of the module may change."""
  names = set(type(model).__dataclass_fields__) - absent
  return {name: getattr(model, name) for name in sorted(names)}


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
  """Settings that are published beside weights; {} where there are none."""
  if not path.is_file():
    return {}
  try:
    settings = json.loads(path.read_text())
    # The settings are at the top level of config.json, or under 'config'.
    return dict(settings.get('config', settings))
  except (AttributeError, TypeError, ValueError) as error:
    raise errors.WeightsError(
      f'{path} is damaged ({error}); copy or download it again, or take it away'
    ) from error


def _write_run(
  workdir: str,
  config: Mapping[str, Any],
  group: str,
  params: PyTree,
  imported: Mapping[str, str],
  *,
  stats: Mapping[str, PyTree] | None = None,
  **meta: Any,
) -> None:
  """Writes a workdir at step 0, whose running means are the parameters.

  Args:
    workdir: the folder.
    config: configuration of the training, as far as it is known.
    group: name of the group of parameters.
    params: by module.
    imported: record of the import, for config.json and the checkpoint.
    stats: statistics without a gradient.
    **meta: saved beside the checkpoint.
  """
  imported = dict(imported)
  checkpointing.write_config(workdir, {**config, 'imported': imported})
  params = jax.tree.map(jnp.asarray, params)
  state = state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params={group: params},
    ema={group: params},
    opt={},
    stats=dict(stats or {}),
  )
  checkpointer = checkpointing.Checkpointer(workdir, max_to_keep=1)
  checkpointer.save(state, {**meta, 'imported': imported})
  checkpointer.close()
