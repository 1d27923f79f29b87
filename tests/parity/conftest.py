"""Makes torchvision importable beside a torch for CPUs."""

import importlib.util
import os
import pathlib

os.environ.setdefault('HF_HUB_OFFLINE', '1')

# torchvision describes them, whether or not they are there.
_OPERATORS = (
  'nms(Tensor boxes, Tensor scores, float threshold) -> Tensor',
  'qnms(Tensor boxes, Tensor scores, float threshold) -> Tensor',
)


def _declare_operators():
  """Stands in for torchvision's extension where that is of another torch.

  The wheel of the package index is linked with CUDA, and a torch for CPUs
  cannot load it.
  """
  specs = [importlib.util.find_spec(name) for name in ('torch', 'torchvision')]
  if None in specs:
    return None
  import torch

  folder = pathlib.Path(specs[1].origin).parent
  for path in folder.glob('_C.*'):
    try:
      torch.ops.load_library(path)
    except OSError:
      library = torch.library.Library('torchvision', 'DEF')
      for operator in _OPERATORS:
        library.define(operator)
      return library
  return None


# Held: operators go with it.
_LIBRARY = _declare_operators()
