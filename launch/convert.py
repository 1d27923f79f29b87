"""Imports published weights by hand; a training does the same by itself.

  python -m launch.convert --list
  python -m launch.convert --network=dinov2_b
  python -m launch.convert --network=lpips_vgg:WEIGHTS --out=FOLDER

Parameters go into the cache, see `selfboottok_jax.pretrained.store`, and with
--out also into a folder or a .safetensors file, which is a source for the same
network on a machine without torch or without network: --network=NAME:FOLDER.
"""

import json
import pathlib
import shutil
from typing import Any

from launch import cli
from selfboottok_jax import errors, files, pretrained
from selfboottok_jax.evaluation import tables
from selfboottok_jax.pretrained import (
  entries,
  released_generators,
  softvq,
  store,
  weight_files,
)

FLAGS = cli.Flags()
_NETWORK = FLAGS.string('network', '', 'NAME or NAME:SOURCE.')
_OPTIONS = FLAGS.strings(
  'options', [], "The network's own, as grid=16,patch_size=14."
)
_OUT = FLAGS.string('out', '', 'New folder or .safetensors file.')
_LIST = FLAGS.switch('list', False, 'Tell which networks are published.')


def main() -> None:
  """Does what the flags say."""
  if _LIST.value:
    cli.say(listing())
    return
  cli.require(network=_NETWORK.value)
  out = pathlib.Path(_OUT.value) if _OUT.value else None
  if out:
    _check_out(out)
  # The accelerator may be another's, and has nothing to do here.
  cli.start_jax(devices=1)
  for record in import_network(_NETWORK.value, _options(_OPTIONS.value)):
    path = pathlib.Path(record['params'])
    if out:
      path = export(path, out)
    cli.say(summary(record, path))


def import_network(
  spec: str, options: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
  """Loads a network or a distance, and so imports its weights.

  Args:
    spec: 'NAME' or 'NAME:SOURCE'.
    options: of the network, see `pretrained`.

  Returns:
    The records of its weight files, see `store.watch`; there is usually one.

  Raises:
    UserError: no such network or option, or one without weights.
    WeightsError: see `store.load`.
  """
  name = spec.partition(':')[0]
  loader = next((load for names, load in _loaders() if name in names), None)
  if loader is None:
    if name in released_generators.RELEASED:
      raise errors.ConfigError(
        f'--network={spec} is a generator, which becomes a run: python -m '
        f'launch.import_generator --network={spec} --workdir=RUN'
      )
    if name in softvq.RELEASED:
      raise errors.ConfigError(
        f'--network={spec} is a tokenizer, which becomes a run: python -m '
        f'launch.import_softvq --network={spec} --workdir=RUN'
      )
    known = dict.fromkeys(name for names, _ in _loaders() for name in names)
    raise errors.ConfigError(
      f'--network={spec} is none; wanted one of {", ".join(known)}'
    )
  with store.watch() as records:
    loader(spec, **(options or {}))
  if not records:
    raise errors.ConfigError(
      f'--network={spec} has no weights to import; it can be used as it is'
    )
  return records


def _loaders():
  """Names of each kind of network, and what loads it."""
  return (
    (pretrained.PERCEPTUALS, pretrained.load_perceptual),
    (pretrained.NETWORKS, pretrained.load_network),
    (pretrained.TRUNKS, pretrained.load_trunk),
  )


def export(params: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
  """Copies imported parameters and their record to `out`; returns the path."""
  is_file = out.suffix in weight_files.SUFFIXES
  path = out if is_file else out / entries.PARAMS
  record = out.with_suffix('.json') if is_file else out / entries.RECORD
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(params, path)
    digest = {'params_sha256': entries.sha256(path)}
    text = json.dumps((entries.record_of(path) or {}) | digest, indent=2)
    record.write_text(text + '\n')
  except OSError as error:
    raise errors.ConfigError(
      f'--out={out} cannot be written ({error.strerror}); choose another place'
    ) from error
  return path


def summary(record: dict[str, Any], path: pathlib.Path) -> str:
  """One line: network, size, source with its SHA-256, and where it is now."""
  count = sum(array.size for array in weight_files.read(path).values())
  digests = ' '.join(record['files'].values())
  return (
    f'{record["network"]}: {count / 1e6:.1f}M parameters from '
    f'{record["source"]} (SHA-256 {digests}) in {path}'
  )


def listing() -> str:
  """A table of `pretrained.published_networks`, and of released tokenizers."""
  places = pretrained.published_networks() | {
    name: place for name, place in softvq.RELEASED.items() if place
  }
  rows = [
    {
      'network': name,
      'parameters': f'{place.millions:.1f}M',
      'licence': place.licence,
      'use': place.use,
      'hub or page': place.hub or place.url,
    }
    for name, place in places.items()
  ]
  return tables.table(rows, list(rows[0]))


def _options(given: list[str]) -> dict[str, Any]:
  """Texts as NAME=VALUE to arguments: numbers, true and false are such."""
  options = {}
  for text in given:
    name, equals, value = text.partition('=')
    if not equals:
      raise errors.ConfigError(
        f'--options={text}; wanted NAME=VALUE, several with commas between'
      )
    try:
      options[name] = json.loads(value)
    except ValueError:
      options[name] = value
  return options


def _check_out(out: pathlib.Path) -> None:
  """Raises ConfigError unless `out` is new, or an empty folder."""
  if out.suffix in weight_files.SUFFIXES and out.suffix != '.safetensors':
    raise errors.ConfigError(
      f'--out={out}: parameters are written as .safetensors alone; choose such '
      'a name, or a folder'
    )
  is_file = out.suffix == '.safetensors'
  taken = [p for p in (out, out.with_suffix('.json')) if p.exists()]
  if taken if is_file else out.is_dir() and any(out.iterdir()):
    raise errors.ConfigError(
      f'--out={out} is there already; choose a new one, nothing is overwritten'
    )
  files.check_folder('out', out.parent if is_file else out)


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
