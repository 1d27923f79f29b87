"""The torch steps that ours are timed against are of the same networks."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from selfboottok_jax.models import aligners, discriminators, sit
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.objectives import alignment
from selfboottok_jax.presets import generator as generator_config
from selfboottok_jax.presets import tokenizer as tokenizer_config
from selfboottok_jax.pretrained import dino, lpips, vision, vit
from tests import tiny
from tests.parity import (
  public,
  torch_frozen,
  torch_parts,
  torch_sit,
  torch_steps,
  torch_tokenizer,
)

REAL = torch_steps.SIZES['real']
NAMES = ('generator', 'tokenizer', 'tokenizer_full')
# Each kind of block once; two for the trunk's, with and without a gradient.
GRAPHS = {
  ('generator', 'whole'): 1,
  ('generator', 'blocks'): 1,
  ('tokenizer', 'whole'): 1,
  ('tokenizer', 'blocks'): 3,
  ('tokenizer_full', 'whole'): 4,
  ('tokenizer_full', 'blocks'): 7,
}
KEYS = {
  *('name', 'framework', 'compiled', 'batch_size', 'step_ms'),
  *('images_per_second', 'parameters', 'memory_bytes', 'torch', 'device'),
}


def _count(init, *shapes) -> int:
  """Parameters that a module of ours would make, which makes none."""
  made = jax.eval_shape(init, jax.random.key(0), *shapes)
  return sum(leaf.size for leaf in jax.tree.leaves(made))


def _shape(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def _on_meta(build) -> int:
  with torch.device('meta'):
    return torch_parts.count(build())


def test_the_generator_is_that_of_the_preset():
  fields = REAL.generator
  config = generator_config.get_config('imagenet256_xl')
  chosen = config.model.to_dict()
  given = ('num_tokens', 'token_dim', 'num_classes', 'cls_dim', 'align_dim')
  assert {k: v for k, v in fields.items() if k not in given} == {
    k: chosen[k] for k in fields if k not in given
  }
  assert config.data.batch_size == REAL.generator_batch
  assert config.networks.teacher == 'dinov2_b'
  model = sit.SiT(**chosen | {k: fields[k] for k in given})
  ours = _count(
    lambda *a: model.init(*a)['params'],
    _shape(1, fields['num_tokens'], fields['token_dim']),
    _shape(1),
    _shape(1, dtype=jnp.int32),
    _shape(1, fields['cls_dim']),
  )
  assert ours == _on_meta(lambda: torch_sit.SiT(**fields))


def _our_tokenizer():
  """The preset's, from which only the comparison's settings may differ."""
  chosen = tokenizer_config.get_config('imagenet256').model.to_dict()
  return tokenizer_lib.Tokenizer(image_size=256, **chosen)


def test_the_tokenizer_is_that_of_the_preset():
  model = _our_tokenizer()
  for name, value in REAL.tokenizer.items():
    assert getattr(model, name) == value, name
  ours = _count(lambda *a: model.init(*a)['params'], _shape(1, 256, 256, 3))
  build = lambda: torch_tokenizer.Tokenizer(**REAL.tokenizer)  # noqa: E731
  assert ours == _on_meta(build)


def test_what_else_is_trained_is_that_of_the_preset():
  config = tokenizer_config.get_config('imagenet256')
  assert config.discriminator.kind == 'dino'
  trunk = dino.build(config.networks.discriminator)
  heads = discriminators.DinoDiscriminator(**config.discriminator.dino)
  examples = jax.eval_shape(trunk.examples)
  ours = _count(lambda *a: heads.init(*a)['params'], examples)
  assert ours == _on_meta(lambda: torch_steps.make_heads(REAL))
  model, tokens = _our_tokenizer(), _shape(1, 64, 32)
  ours = _count(lambda *a: model.init(*a)['params'], _shape(1, 256, 256, 3))
  for term in ('repa_global', 'repa_local'):
    width = vision.TEACHERS[config.networks[term]].width
    head = aligners.Projector(width, config.loss.projector_width)
    ours += _count(lambda *a, h=head: h.init(*a)['params'], tokens)
  assert ours == _on_meta(lambda: torch_steps.WithHeads(REAL))


def test_frozen_networks_are_those_of_the_preset():
  networks = tokenizer_config.get_config('imagenet256').networks
  for spec, fields in zip(
    (networks.repa_global, networks.repa_local), REAL.teachers, strict=True
  ):
    ours = vision.build(spec)
    assert fields['heads'] == ours.vit.heads
    assert fields['patch_size'] == ours.vit.patch_size
    assert _count(ours.init) == _on_meta(lambda f=fields: torch_frozen.Vit(**f))
  trunk = dino.build(networks.discriminator)
  assert trunk.vit.taps == REAL.trunk['taps']
  assert trunk.vit.heads == REAL.trunk['heads']
  ours = _count(lambda key: trunk.init(key))
  assert ours == _on_meta(lambda: torch_frozen.Vit(**REAL.trunk))
  distance = lpips.build(networks.perceptual.removeprefix('lpips_'))
  ours = _count(distance.init)
  assert ours == _on_meta(lambda: torch_frozen.Lpips(REAL.vgg))


def test_the_tokenizer_computes_the_same():
  fields = tiny.TOKENIZER | {'layer_scale': 0.1}
  model = tiny.make_tokenizer(layer_scale=0.1)
  images = tiny.images(2)
  params = tiny.awake(model.init(jax.random.key(0), images))['params']

  @jax.value_and_grad
  def loss(params):
    output = model.apply({'params': params}, images)
    return jnp.mean((output.reconstruction - images) ** 2)

  value, gradients = jax.jit(loss)(params)
  build = lambda: torch_tokenizer.Tokenizer(**fields, tau=model.tau)  # noqa: E731
  network, expected = build(), build()
  torch_parts.load(network, params)
  torch_parts.load(expected, gradients)
  wanted = public.to_torch(images)
  theirs = (network(wanted).reconstruction - wanted).square().mean()
  np.testing.assert_allclose(value, theirs.item(), rtol=1e-5)
  theirs.backward()
  pairs = zip(network.named_parameters(), expected.parameters(), strict=True)
  for (name, parameter), gradient in pairs:
    largest = gradient.abs().max().item()
    np.testing.assert_allclose(
      parameter.grad, gradient.detach(), atol=1e-3 * largest, err_msg=name
    )


@pytest.mark.parametrize('taps', [(), (0, 2)], ids=['teacher', 'trunk'])
def test_vision_transformers_compute_the_same(taps):
  model = vit.Vit(
    (3, 3), 4, 16, 2, 2, 64, layer_scale=True, gelu='tanh', taps=taps
  )
  images = public.images(2, 12, 12)
  shift, scale = (
    np.array(numbers, np.float32)
    for numbers in (torch_frozen.MEAN, torch_frozen.DEVIATION)
  )
  normal = jnp.array((images - (2 * shift - 1)) / (2 * scale))
  params = tiny.awake(model.init(jax.random.key(0), normal))['params']
  network = torch_frozen.Vit(
    grid=3, patch_size=4, width=16, depth=2, heads=2, gain=0.1, gelu='tanh',
    taps=taps,
  )  # fmt: skip
  torch_parts.load(network, params)
  ours = model.apply({'params': params}, normal)
  theirs = network(public.to_torch(images))
  if not taps:
    public.check(ours.patches, theirs)
  for tap, tokens in zip(taps, theirs, strict=True) if taps else ():
    hidden = ours.hidden[tap]
    public.check(hidden[:, 1:] + hidden[:, :1], tokens)


def test_lpips_computes_the_same():
  widths = (3, 4, 5, 6, 7)
  backbone = lpips.vgg(widths)
  model = dataclasses.replace(lpips.build('vgg'), backbone=backbone)
  params = model.init(jax.random.key(0))
  network = torch_frozen.Lpips(widths)
  convolutions = [m for m in network.modules() if hasattr(m, 'kernel_size')]
  convolutions = [m for m in convolutions if hasattr(m, 'weight')]
  with torch.no_grad():
    for name, layer in zip(backbone.kernels, convolutions, strict=True):
      kernel = np.array(params[f'{name}.weight']).transpose(3, 2, 0, 1)
      layer.weight.copy_(torch.from_numpy(kernel))
      layer.bias.zero_()
    for index, head in enumerate(network.heads):
      head.copy_(torch.from_numpy(np.array(params[f'lpips.lin{index}'])))
  fake, real = (public.images(2, 32, 32, seed=seed) for seed in (0, 1))
  ours = model(params, jnp.array(fake), jnp.array(real)).mean()
  theirs = network(public.to_torch(fake), public.to_torch(real))
  np.testing.assert_allclose(ours, theirs.item(), rtol=1e-4)


def test_heads_compute_the_same():
  model = discriminators.DinoDiscriminator(kernel=3)
  keys = jax.random.split(jax.random.key(1))
  taps = [jax.random.normal(key, (2, 5, 8)) for key in keys]
  variables = model.init(jax.random.key(0), taps)
  network = torch_frozen.Heads(2, 8, 3)
  ours = variables['params']
  renamed = {'heads': {str(i): ours[f'head_{i}'] for i in range(2)}}
  torch_parts.load(network, renamed)
  # The estimates of the spectral norm start from the same vectors.
  for i, head in enumerate(network.heads):
    for name in ('embed', 'around', 'logit'):
      norms = variables[discriminators.NORMS][f'head_{i}'][name]
      convolution = getattr(head, name)
      if name != 'logit':
        norms, convolution = norms['conv'], convolution.conv
      convolution.u.copy_(torch.from_numpy(np.array(norms['spectral']['u'])))
  logits, _ = model.apply(
    variables, taps, train=True, mutable=[discriminators.NORMS]
  )
  theirs = network([torch.from_numpy(np.array(tap)) for tap in taps])
  np.testing.assert_allclose(logits, theirs.detach(), rtol=1e-3, atol=1e-4)


def test_alignment_is_ours():
  rng = np.random.default_rng(0)
  tokens, patches = (
    rng.normal(size=(2, n, 6)).astype(np.float32) for n in (4, 12)
  )
  ours = alignment.alignment_loss(jnp.array(patches), jnp.array(tokens))
  theirs = torch_steps.repa_loss(*map(torch.from_numpy, (tokens, patches)))
  np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)


def _records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_is_measured(tmp_path, capsys):
  out = tmp_path / 'rows.jsonl'
  flags = ['--size=tiny', '--device=cpu', '--steps=1', '--rounds=2']
  assert torch_steps.main([*flags, '--compiled=no', f'--out={out}']) == 0
  records = _records(out)
  assert capsys.readouterr().out == out.read_text()
  assert [record['name'] for record in records] == list(NAMES)
  for record in records:
    assert record.keys() >= KEYS
    assert 'skipped' not in record
    assert record['framework'] == 'torch'
    assert not record['compiled']
    assert record['size'] == 'tiny'
    assert record['torch'] == torch.__version__
    assert np.isfinite(record['loss'])
    rate = 1e3 * record['batch_size'] / record['step_ms']
    np.testing.assert_allclose(record['images_per_second'], rate)


@pytest.mark.parametrize('name', NAMES)
def test_steps_train(name):
  prepare = torch_steps.PREPARE[name]
  row = prepare(torch_steps.SIZES['tiny'], torch.device('cpu'), '')
  losses = []
  for _ in range(8):
    # The same noise at every step.
    torch.manual_seed(0)
    losses.append(row.step().item())
  assert losses[-1] < losses[0]


# On a GPU it is inductor that takes the graphs, which compiles for minutes on
# a CPU. A graph that would break fails.
@pytest.mark.parametrize('way', ['whole', 'blocks'])
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.slow
# The compiler looks at this attribute, and hides the warning if it may.
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor')
def test_compiled_steps_are_the_eager_ones(name, way, monkeypatch):
  monkeypatch.setattr(torch_steps, 'BACKEND', 'aot_eager')
  losses = []
  for compiled in ('', way):
    torch.manual_seed(0)
    prepare = torch_steps.PREPARE[name]
    row = prepare(torch_steps.SIZES['tiny'], torch.device('cpu'), compiled)
    losses.append([row.step().item() for _ in range(3)])
  seen = torch._dynamo.utils.counters
  assert seen['stats']['unique_graphs'] == GRAPHS[name, way]
  assert not seen['graph_break']
  torch.compiler.reset()
  seen.clear()
  # Updates of 1e-4 in 16 bits.
  np.testing.assert_allclose(*losses, rtol=4e-3)


def test_torch_is_all_that_the_steps_need():
  for path in pathlib.Path(__file__).parent.glob('torch_*.py'):
    if not path.stem.endswith('_test'):
      ours = r'^(import|from) (jax|flax|selfboottok_jax)'
      assert not re.search(ours, path.read_text(), re.M), path


def test_rows_that_do_not_fit_are_recorded(tmp_path, monkeypatch):
  out = tmp_path / 'rows.jsonl'
  flags = ['--size=tiny', '--device=cpu', '--compiled=no', f'--out={out}']

  def endless(*_):
    while True:
      pass

  monkeypatch.setitem(torch_steps.PREPARE, 'tokenizer', endless)
  names = ['--steps=1', '--rounds=1', '--seconds=2', '--only=tokenizer']
  assert torch_steps.main([*flags, *names]) == 0
  (record,) = _records(out)
  assert record['name'] == 'tokenizer'
  assert record['skipped'] == 'not done within --seconds=2'


def test_a_row_that_fails_leaves_the_others(tmp_path, monkeypatch):
  out = tmp_path / 'rows.jsonl'
  flags = ['--size=tiny', '--device=cpu', '--compiled=no', f'--out={out}']

  def fail(*_):
    raise torch.OutOfMemoryError('too large\nfor this')

  monkeypatch.setitem(torch_steps.PREPARE, 'generator', fail)
  monkeypatch.delitem(torch_steps.PREPARE, 'tokenizer_full')
  assert torch_steps.main([*flags, '--steps=1', '--rounds=1']) == 1
  failed, measured = _records(out)
  assert failed['skipped'] == 'OutOfMemoryError: too large'
  assert measured['name'] == 'tokenizer'
  assert measured['step_ms'] > 0


@pytest.mark.parametrize(
  'flag',
  ['--steps=0', '--seconds=0', '--only=generators', '--out=no/such/folder'],
)
def test_flags_are_checked(flag, capsys):
  with pytest.raises(SystemExit):
    torch_steps.main([flag, '--size=tiny', '--device=cpu'])
  assert flag.split('=')[0] in capsys.readouterr().err
