"""Shared parts of the comparisons with public torch implementations."""

import math
import pathlib
import re

import numpy as np
import safetensors.numpy
import torch

# Wanted are 1e-4. Sound features agree within 2e-6, and the smallest mistake
# tried, the other GELU, shows 3e-4.
TOLERANCE = 2e-5
_NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)


@torch.no_grad()
def randomise(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Weights under which every part of a network shows in what comes out.

  As initialised much would not: attention is flat, LayerScale takes 1e-5 of a
  block, biases are 0 and norms change nothing. Embeddings are small, so that a
  norm's epsilon counts.
  """
  generator = torch.Generator().manual_seed(seed)
  owners = dict(module.named_modules())
  for name, parameter in module.named_parameters():
    noise = torch.randn(parameter.shape, generator=generator)
    owner = owners[name.rpartition('.')[0]]
    parameter.copy_(_numbers(name, owner, noise))
  for name, buffer in module.named_buffers():
    noise = torch.rand(buffer.shape, generator=generator)
    if name.endswith('running_mean'):
      buffer.copy_(noise - 0.5)
    elif name.endswith('running_var'):
      buffer.copy_(noise + 0.5)
  return module.eval().requires_grad_(False)


def _numbers(name, owner, noise):
  if re.search(r'lambda1$|gamma$', name):
    return 0.3 + 0.1 * noise
  if isinstance(owner, _NORMS) and name.endswith('weight'):
    return 1 + 0.2 * noise
  if name.endswith('bias') or isinstance(owner, _NORMS):
    return 0.1 * noise
  if re.search(r'token|probe|pos_embed|position', name):
    return 0.05 * noise
  noise = noise / math.sqrt(noise[0].numel())
  if re.search(r'patch_embed|conv_in', name):
    return 0.05 * noise
  if re.search(r'qkv|in_proj', name):
    third = len(noise) // 3
    return torch.cat([2.5 * noise[: 2 * third], noise[2 * third :]])
  if re.search(r'(query|key|q_proj|k_proj|to_q|to_k)\.', name):
    return 2.5 * noise
  if isinstance(owner, torch.nn.Conv2d) or 'mlp.fc' in name:
    return math.sqrt(2) * noise
  return noise


def state_dict(module: torch.nn.Module) -> dict[str, np.ndarray]:
  """Arrays by their names in memory, counters of training steps left out."""
  return {
    name: array.numpy()
    for name, array in module.state_dict().items()
    if not name.endswith('num_batches_tracked')
  }


def saved(model, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Arrays by their names in the files that transformers writes."""
  model.save_pretrained(folder)
  path = folder / 'model.safetensors'
  arrays = safetensors.numpy.load_file(path)
  path.unlink()
  return arrays


def images(*shape: int, seed: int = 0) -> np.ndarray:
  """Smooth random images [b, h, w, 3] in [-1, 1]."""
  b, h, w = shape
  rng = np.random.default_rng(seed)
  rows, columns = (np.arange(n)[:, None] / n for n in (h, w))
  waves = np.arange(1, 7)
  up, right = (np.sin(np.pi * waves * x + waves) for x in (rows, columns))
  mix = rng.standard_normal((b, 6, 6, 3)) / 6
  smooth = np.einsum('hi,wj,bijc->bhwc', up, right, mix)
  noise = 0.3 * rng.standard_normal(smooth.shape)
  return np.clip(smooth + noise, -1, 1).astype(np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
  """[b, h, w, c] to [b, c, h, w]."""
  return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).contiguous()


def from_torch(x: torch.Tensor) -> np.ndarray:
  """[b, c, h, w] to [b, h, w, c]; other shapes as they are."""
  x = x.detach()
  return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).numpy()


def relative_error(actual, expected) -> float:
  """|a - b| / |b| over all numbers; `expected` is torch's."""
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(from_torch(expected), np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def check(actual, expected, label: str = '') -> None:
  """Asserts the same numbers up to TOLERANCE."""
  error = relative_error(actual, expected)
  assert error <= TOLERANCE, f'{label}: relative error {error:.2e}'
