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
from typing import Any

from launch import cli
from selfboottok_jax import errors, files, pretrained
from selfboottok_jax.evaluation import tables
from selfboottok_jax.pretrained import store, weight_files

FLAGS = cli.Flags()
_NETWORK = FLAGS.string('network', '', 'NAME or NAME:SOURCE.')
_OPTIONS = FLAGS.strings(
  'options', [], "The network's own, as grid=16,patch_size=14."
)
_OUT = FLAGS.string('out', '', 'New folder or .safetensors file.')
_LIST = FLAGS.switch('list', False, 'List the published networks.')


def main() -> None:
  """Lists the networks, or imports the one that the flags name."""
  if _LIST.value:
    cli.say(_listing())
    return
  cli.require(network=_NETWORK.value)
  out = None
  if _OUT.value:
    out = files.local_path('--out', _OUT.value, weight_files.ELSEWHERE)
  if out:
    store.check_new(out)
  options = _parse_options(_OPTIONS.value)
  # The accelerator may be in use elsewhere, and is not needed here.
  cli.start_jax(devices=1)
  for record in pretrained.import_network(_NETWORK.value, **options):
    path = pathlib.Path(record['params'])
    if out:
      path = store.export(path, out)
    cli.say(_summary(record, path))


def _summary(record: dict[str, Any], path: pathlib.Path) -> str:
  """One line: network, size, source with its SHA-256, and path of the copy."""
  count = sum(array.size for array in weight_files.read(path).values())
  digests = ' '.join(record['files'].values())
  return (
    f'{record["network"]}: {count / 1e6:.1f}M parameters from '
    f'{record["source"]} (SHA-256 {digests}) in {path}'
  )


def _listing() -> str:
  """A table of all networks that `--network` imports."""
  rows = [
    {
      'network': name,
      'parameters': f'{place.millions:.1f}M',
      'licence': place.licence,
      'use': place.use,
      'hub or page': place.hub or place.url,
    }
    for name, place in pretrained.published_networks().items()
  ]
  return tables.table(rows, list(rows[0]))


def _parse_options(given: list[str]) -> dict[str, Any]:
  """Options from texts NAME=VALUE; numbers, true and false become such."""
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


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
