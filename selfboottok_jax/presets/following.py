"""Defaults of a preset that follow the size of its images.

A preset's numbers fit its own size. Where another size is set and one of them
does not fit any more, the default becomes the nearest that does. A number that
somebody set is theirs, and is refused if it does not fit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from selfboottok_jax import errors, sizes

# Teachers whose patches are their own, whatever the tokenizer's are.
OWN_PATCHES = ('inception',)


class _Rule(NamedTuple):
  """What ml_collections applies to a field's value whenever it is read."""

  fn: Callable[..., Any]
  args: Sequence[config_dict.FieldReference]


def follow(config: ml_collections.ConfigDict) -> None:
  """Makes the defaults of stage 1 follow, once a preset has set them."""
  for key, rule in (
    ('model.num_tokens', _num_tokens),
    ('model.quantizer_chunk', _quantizer_chunk),
    ('discriminator.stylegan.min_resolution', _min_resolution),
  ):
    *sections, name = key.split('.')
    owner = _section(config, sections)
    # References to fields, not to the configuration: copies of it would go
    # round in a circle.
    fields = [
      _section(config, other.split('.')[:-1]).get_ref(other.split('.')[-1])
      for other in _READ[rule]
    ]
    # Setting the field drops the rule with the value.
    owner[name] = config_dict.FieldReference(
      owner[name], field_type=int, op=_Rule(rule, fields)
    )


def nearest_count(wanted: int, patches: int, multiple: int) -> int | None:
  """The number of tokens nearest to `wanted` that aligns with patches.

  Args:
    wanted: number of tokens.
    patches: number of patches; it divides the result, or the result divides it.
    multiple: what must divide the result.

  Returns:
    The larger of two that are as near; None if there is none from two thirds
    to three halves of `wanted`.
  """
  counts = [
    count
    for count in range(multiple, 3 * wanted // 2 + 1, multiple)
    if 3 * count >= 2 * wanted and not (patches % count and count % patches)
  ]
  return min(counts, key=lambda c: (abs(c - wanted), -c), default=None)


def _num_tokens(
  value: int,
  image_size: Any,
  patch_size: int,
  num_codebooks: int,
  local1d_width: int,
  local2d_depth: int,
  repa_mode: str,
  repa_local_on: str,
  align: float,
  repa_global: float,
  repa_local: float,
  global_teacher: str,
  local_teacher: str,
) -> int:
  """The preset's, unless an alignment is on and cannot pair them."""
  rows, columns = _grid(image_size, patch_size)
  misfit = not rows or num_codebooks < 1 or value % num_codebooks
  if misfit or repa_mode == 'global':
    return value
  has_local = {'local1d': local1d_width > 0, 'local2d': local2d_depth > 0}
  terms = (
    (align * repa_global > 0, global_teacher),
    (align * repa_local > 0 and has_local.get(repa_local_on), local_teacher),
  )
  if not any(
    active and teacher.partition(':')[0] not in OWN_PATCHES
    for active, teacher in terms
  ):
    return value
  return nearest_count(value, rows * columns, num_codebooks) or value


def _quantizer_chunk(value: int, num_tokens: int, num_codebooks: int) -> int:
  """The preset's, or the next smaller one that divides a codebook's tokens.

  It is a matter of memory alone, see `models.tokenizer.Tokenizer`.
  """
  if value < 1 or num_codebooks < 1 or num_tokens < num_codebooks:
    return value
  tokens = num_tokens // num_codebooks
  return next(chunk for chunk in range(value, 0, -1) if tokens % chunk == 0)


def _min_resolution(
  value: int, image_size: Any, patch_size: int, kind: str
) -> int:
  """The preset's, unless sides cannot be halved down to it."""
  if kind != 'stylegan' or value < 1 or _grid(image_size, patch_size) == (0, 0):
    return value
  sides = sizes.pair(sizes.canonical(image_size))
  shorter, halvings = min(sides), 0
  while shorter >> (halvings + 1) >= value:
    halvings += 1
  fitting = halvings
  while fitting and any(side % 2**fitting for side in sides):
    fitting -= 1
  # Without a single halving there would be no discriminator left.
  return value if fitting in (0, halvings) else shorter >> fitting


# What each rule reads, in the order of its parameters.
_READ: dict[Callable[..., int], tuple[str, ...]] = {
  _num_tokens: (
    *('data.image_size', 'model.patch_size', 'model.num_codebooks'),
    *('model.local1d_width', 'model.local2d_depth', 'loss.repa_mode'),
    *('loss.repa_local_on', 'loss.align'),
    *('loss.repa_global', 'loss.repa_local'),
    *('networks.repa_global', 'networks.repa_local'),
  ),
  _quantizer_chunk: ('model.num_tokens', 'model.num_codebooks'),
  _min_resolution: (
    *('data.image_size', 'model.patch_size', 'discriminator.kind'),
  ),
}


def _grid(image_size: Any, patch_size: int) -> tuple[int, int]:
  """Rows and columns of patches; (0, 0) for values that will be refused."""
  try:
    size = sizes.canonical(image_size)
  except errors.ConfigError:
    return 0, 0
  if patch_size < 1 or any(side % patch_size for side in sizes.pair(size)):
    return 0, 0
  return sizes.grid(size, patch_size)


def _section(
  config: ml_collections.ConfigDict, names: Sequence[str]
) -> ml_collections.ConfigDict:
  for name in names:
    config = config[name]
  return config
