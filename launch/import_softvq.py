"""Turns a released SoftVQ-VAE into a run: the baseline, with published weights.

  python -m launch.import_softvq --network=softvq_b64 --workdir=runs/softvq_b64

The network is softvq_b64, softvq_bl64 or softvq_l64, from the hub, or one of
these or 'softvq' with a source: softvq:FILE, softvq:FOLDER, softvq:ORG/REPO.
Scoring, generators and fine-tuning take the workdir like that of any stage 1.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from jaxtyping import PyTree

from launch import cli
from selfboottok_jax import errors, tasks
from selfboottok_jax.evaluation import evaluate
from selfboottok_jax.inference import softvq, softvq_weights
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.pretrained import files, hub, sources, store
from selfboottok_jax.tasks import parts
from selfboottok_jax.training import checkpointing
from selfboottok_jax.training import state as state_lib

_NETWORK = flags.DEFINE_string('network', None, 'NAME or NAME:SOURCE.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is written.')

# Fields of the module that are no keys of `config.model`.
_NOT_MODEL = {'image_size', 'parent', 'name'}


def main(argv) -> None:
  """Imports what the flags say."""
  del argv
  spec, workdir = _NETWORK.value, _WORKDIR.value
  cli.require(network=spec, workdir=workdir)
  cli.check_folder('workdir', workdir)
  cli.start_jax()
  weights, settings_file = find(spec)
  arrays, settings = files.read(weights), _read_settings(settings_file)
  fields = softvq.fields(arrays, str(weights), settings)
  model = tokenizer_lib.Tokenizer(**fields)
  model.check()
  params = softvq_weights.read(arrays, model, str(weights))
  write_run(workdir, model, params, spec)
  count = tasks.count(parts.model_params(params))
  cli.say(
    f'{workdir}: {count / 1e6:.1f}M parameters, images of {model.image_size}, '
    f'{model.num_tokens} tokens of {model.token_dim}, tau {model.tau}'
  )


def find(spec: str) -> tuple[pathlib.Path, pathlib.Path]:
  """The state dict, and its settings, which need not exist; may download."""
  name, _, source = spec.partition(':')
  if name not in softvq.RELEASED:
    raise errors.ConfigError(
      f'--network={spec}; wanted one of {", ".join(softvq.RELEASED)}, or with '
      'a source, as softvq:FILE, softvq:FOLDER or softvq:ORG/REPO'
    )
  cache = store.cache_folder()
  found = sources.resolve(
    name, source, softvq.RELEASED[name], cache / 'files' / name
  )
  if isinstance(found, sources.Hub):
    both = (softvq.WEIGHTS, softvq.SETTINGS)
    paths = hub.download(
      name, dataclasses.replace(found, files=both), cache / 'hub'
    )
    return paths[softvq.WEIGHTS], paths[softvq.SETTINGS]
  if len(found.files) > 1:
    raise errors.WeightsError(
      f'--network={spec} names {len(found.files)} files; wanted the one that '
      'holds the whole state dict'
    )
  return found.files[0], found.files[0].with_name(softvq.SETTINGS)


def _read_settings(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    settings = json.loads(path.read_text())
    # The hub's class spreads its argument out, or keeps it by name.
    return dict(settings.get('config', settings))
  except (AttributeError, TypeError, ValueError) as error:
    raise errors.WeightsError(
      f'{path} is damaged ({error}); copy or download it again, or take it away'
    ) from error


def write_run(
  workdir: str,
  model: tokenizer_lib.Tokenizer,
  params: dict[str, PyTree],
  spec: str,
) -> None:
  """Writes a workdir at step 0, whose running means are the parameters.

  Raises:
    CheckpointError: the workdir holds another run.
  """
  digest = evaluate.weights_hash(parts.model_params(params))
  imported = {'network': spec, 'weights': digest}
  names = set(tokenizer_lib.Tokenizer.__dataclass_fields__) - _NOT_MODEL
  config = {
    'task': 'tokenizer',
    'imported': imported,
    'data': {'source': 'auto', 'path': '', 'image_size': model.image_size},
    'model': {name: getattr(model, name) for name in sorted(names)},
  }
  checkpointing.write_config(workdir, config)
  params = jax.tree.map(jnp.asarray, params)
  state = state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    params={'tokenizer': params},
    ema={'tokenizer': params},
    opt={},
    stats={},
  )
  checkpointer = checkpointing.Checkpointer(workdir, max_to_keep=1)
  checkpointer.save(state, {'class_names': [], 'imported': imported})
  checkpointer.close()


if __name__ == '__main__':
  cli.run(main, continues=False)
