"""SiT of SoftVQ's repository: its arguments and state dict as ours."""

import numpy as np

from selfboottok_jax.models import sit

_MODULES = {
  'x_embedder': 'token_embed',
  't_embedder.mlp.0': 'time0',
  't_embedder.mlp.2': 'time1',
  'final_layer.adaLN_modulation.1': 'modulation',
  'final_layer.linear': 'to_velocity',
}
_BLOCK = {
  'adaLN_modulation.1': ('modulation',),
  'attn.qkv': ('attn', 'qkv'),
  'attn.proj': ('attn', 'out'),
  'mlp.fc1': ('mlp', 'up'),
  'mlp.fc2': ('mlp', 'down'),
}
_NORMS = {
  'attn.q_norm': ('attn', 'query_norm'),
  'attn.k_norm': ('attn', 'key_norm'),
}


def build(args: dict) -> sit.SiT:
  """The module that the reference's `model_args` describe."""
  return sit.SiT(
    num_tokens=args['input_size'],
    token_dim=args['in_channels'],
    num_classes=args['num_classes'],
    width=args['hidden_size'],
    depth=args['depth'],
    heads=args['num_heads'],
    mlp_ratio=args.get('mlp_ratio', 4.0),
    qk_norm=args.get('qk_norm', False),
  )


def convert(weights: dict[str, np.ndarray], depth: int) -> dict:
  """Parameters from a state dict; all but the position table is used."""
  left = dict(weights)
  left.pop('pos_embed')

  def linear(name):
    return {
      'kernel': left.pop(f'{name}.weight').T,
      'bias': left.pop(f'{name}.bias'),
    }

  def norm(name):
    return {
      'scale': left.pop(f'{name}.weight'),
      'bias': left.pop(f'{name}.bias'),
    }

  def block(i):
    tree = {}
    for rules, read in ((_BLOCK, linear), (_NORMS, norm)):
      for source, (*outer, inner) in rules.items():
        if f'blocks.{i}.{source}.weight' not in left:
          continue
        node = tree
        for name in outer:
          node = node.setdefault(name, {})
        node[inner] = read(f'blocks.{i}.{source}')
    return tree

  params = {ours: linear(theirs) for theirs, ours in _MODULES.items()}
  params['label_table'] = {
    'embedding': left.pop('y_embedder.embedding_table.weight')
  }
  params['blocks'] = {'block': _stack([block(i) for i in range(depth)])}
  assert not left, f'unused weights: {sorted(left)}'
  return {'params': params}


def _stack(trees):
  if isinstance(trees[0], dict):
    return {k: _stack([t[k] for t in trees]) for k in trees[0]}
  return np.stack(trees)
