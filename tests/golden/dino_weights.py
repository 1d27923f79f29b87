"""Recorded discriminators as ours: heads with their statistics, and trunk."""

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from selfboottok_jax.models import discriminators
from selfboottok_jax.pretrained import dino, vit
from tests.golden import fixtures

# Our name of a layer of a head to the recorded one of its convolution.
CONVS = {
  ('embed', 'conv'): '0.0',
  ('around', 'conv'): '1.fn.0',
  ('logit',): '2',
}
NORMS = {('embed', 'norm'): '0.1', ('around', 'norm'): '1.fn.1'}
BUFFERS = ('weight_u', 'weight_v', 'running_mean', 'running_var')


def load(name, part):
  """One of the weight files beside a fixture."""
  path = fixtures.path('tokenizer', name).with_name(
    f'{name}_{part}.safetensors'
  )
  return safetensors.numpy.load_file(path)


def trunk(name, meta) -> dino.DinoTrunk:
  """The recorded trunk, its readouts after `key_depths` and before them."""
  network = vit.Vit(
    (14, 14), 16, meta['embed_dim'], meta['depth'], meta['num_heads'],
    4 * meta['embed_dim'],
    gelu='tanh',
    taps=(0, *(depth + 1 for depth in meta['key_depths'])),
  )  # fmt: skip
  empty = dino.DinoTrunk(name, network, None)
  params = empty.read(load(name, 'trunk'), name)
  return dino.DinoTrunk(name, network, None, params)


def _index(names, head):
  return f'heads.{head}.{names}'


def variables(arrays, heads=5):
  """{'params', NORMS} from a state dict of heads."""
  params, norms = {}, {}
  for head in range(heads):
    for path, theirs in CONVS.items():
      name = _index(theirs, head)
      kernel = arrays[f'{name}.weight_orig']
      # Theirs is (outputs, inputs, positions).
      _put(params, head, (*path, 'kernel'), kernel.transpose(2, 1, 0))
      _put(params, head, (*path, 'bias'), arrays[f'{name}.bias'])
      v = arrays[f'{name}.weight_v'].reshape(kernel.shape[1:])
      _put(norms, head, (*path, 'spectral', 'v'), v.T.reshape(-1))
      u = arrays[f'{name}.weight_u']
      _put(norms, head, (*path, 'spectral', 'u'), u)
    for path, theirs in NORMS.items():
      name = _index(theirs, head)
      for tree, key, other in (
        (params, 'scale', 'weight'),
        (params, 'bias', 'bias'),
        (norms, 'mean', 'running_mean'),
        (norms, 'variance', 'running_var'),
      ):
        _put(tree, head, (*path, key), arrays[f'{name}.{other}'])
  return {'params': params, discriminators.NORMS: norms}


def recorded_name(params, norms, name):
  """The array of ours that is recorded as `name`, in its recorded layout."""
  _, head, rest = name.split('.', 2)
  layer, leaf = rest.rsplit('.', 1)
  paths = {theirs: path for path, theirs in (CONVS | NORMS).items()}
  path = (f'head_{head}', *paths[layer])
  if layer in CONVS.values():
    kernel = _get(params, (*path, 'kernel'))
    if leaf == 'weight_orig':
      return kernel.transpose(2, 1, 0)
    if leaf == 'weight_u':
      return _get(norms, (*path, 'spectral', 'u'))
    if leaf == 'weight_v':
      v = _get(norms, (*path, 'spectral', 'v'))
      return v.reshape(kernel.shape[:2]).T.reshape(-1)
    return _get(params, (*path, leaf))
  ours = {'running_mean': 'mean', 'running_var': 'variance', 'weight': 'scale'}
  tree = norms if leaf in BUFFERS else params
  return _get(tree, (*path, ours.get(leaf, leaf)))


def _put(tree, head, path, array):
  tree = tree.setdefault(f'head_{head}', {})
  for part in path[:-1]:
    tree = tree.setdefault(part, {})
  tree[path[-1]] = jnp.asarray(array)


def _get(tree, path):
  for part in path:
    tree = tree[part]
  return np.asarray(tree)
