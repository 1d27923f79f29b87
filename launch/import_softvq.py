"""Turns a released SoftVQ-VAE into a run: the baseline, with published weights.

  python -m launch.import_softvq --network=softvq_b64 --workdir=runs/softvq_b64

The network is softvq_b64, softvq_bl64 or softvq_l64, from the hub, or one of
these or 'softvq' with a source: softvq:FILE, softvq:FOLDER, softvq:ORG/REPO.
Scoring, generators and fine-tuning take the workdir like that of any stage 1.
"""

import json
import pathlib
from typing import Any

from launch import cli
from selfboottok_jax import errors, files, trees
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.models import tokenizer_params
from selfboottok_jax.pretrained import softvq, softvq_weights, weight_files
from selfboottok_jax.stages import imports

FLAGS = cli.Flags()
_NETWORK = FLAGS.string('network', '', 'NAME or NAME:SOURCE.')
_WORKDIR = FLAGS.string('workdir', '', 'Where the run is written.')

# Fields of the module that are no keys of `config.model`.
_NOT_MODEL = {'image_size', 'parent', 'name'}


def main() -> None:
  """Imports what the flags say."""
  spec, workdir = _NETWORK.value, _WORKDIR.value
  cli.require(network=spec, workdir=workdir)
  files.check_folder('workdir', workdir)
  cli.start_jax()
  weights, settings_file = imports.find(spec, softvq.RELEASED, softvq.SETTINGS)
  arrays, settings = weight_files.read(weights), _read_settings(settings_file)
  fields = softvq.fields(arrays, str(weights), settings)
  model = tokenizer_lib.Tokenizer(**fields)
  model.check()
  params = softvq_weights.read(arrays, model, str(weights))
  digest = trees.weights_hash(tokenizer_params.model_params(params))
  imports.write_run(
    workdir,
    configure(model),
    'tokenizer',
    params,
    {'network': spec, 'weights': digest},
    class_names=[],
  )
  count = trees.count(tokenizer_params.model_params(params))
  cli.say(
    f'{workdir}: {count / 1e6:.1f}M parameters, images of {model.image_size}, '
    f'{model.num_tokens} tokens of {model.token_dim}, tau {model.tau}'
  )


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


def configure(model: tokenizer_lib.Tokenizer) -> dict[str, Any]:
  """The configuration of its training, as far as it is known."""
  names = set(tokenizer_lib.Tokenizer.__dataclass_fields__) - _NOT_MODEL
  return {
    'task': 'tokenizer',
    'data': {'source': 'auto', 'path': '', 'image_size': model.image_size},
    'model': {name: getattr(model, name) for name in sorted(names)},
  }


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
