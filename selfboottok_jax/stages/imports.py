"""What the importing of released networks as runs has in common."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from selfboottok_jax import errors
from selfboottok_jax.pretrained import hub, sources, store
from selfboottok_jax.pretrained import published as published_lib
from selfboottok_jax.training import checkpointing, workdirs
from selfboottok_jax.training import state as state_lib


def find(
  spec: str,
  released: Mapping[str, published_lib.Published | None],
  *beside: str,
) -> tuple[pathlib.Path, ...]:
  """Where the files of a released network are; may download.

  Args:
    spec: 'NAME' or 'NAME:SOURCE', see `pretrained.sources`.
    released: the networks, by name, and where each is published.
    *beside: names of files that lie beside the weights.

  Returns:
    The weights, and the files beside them, which need not exist.

  Raises:
    ConfigError: no such network.
    WeightsError: no such source, or several files in place of one.
  """
  name, _, source = spec.partition(':')
  if name not in released:
    example = next(iter(released))
    raise errors.ConfigError(
      f'--network={spec}; wanted one of {", ".join(released)}, or with a '
      f'source, as {example}:FILE, {example}:FOLDER or {example}:ORG/REPO'
    )
  cache = store.cache_folder()
  found = sources.resolve(name, source, released[name], cache / 'files' / name)
  if isinstance(found, sources.Hub):
    wanted = dataclasses.replace(found, files=(*found.files, *beside))
    return tuple(hub.download(name, wanted, cache / 'hub').values())
  if len(found.files) > 1:
    raise errors.WeightsError(
      f'--network={spec} names {len(found.files)} files; wanted the one that '
      'holds the whole state dict'
    )
  (weights,) = found.files
  return weights, *(weights.with_name(other) for other in beside)


def write_run(
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
    config: of the training, as far as it is known.
    group: of the parameters.
    params: by module.
    imported: what was imported, for config.json and the checkpoint.
    stats: statistics without a gradient.
    **meta: saved beside the checkpoint.

  Raises:
    CheckpointError: the workdir holds another run.
  """
  imported = dict(imported)
  workdirs.write_config(workdir, {**config, 'imported': imported})
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
