"""Times whole training steps in torch of the networks that we train in JAX.

  python -m tests.parity.torch_steps --steps=10 --out=FILE

Needs torch alone. Rows, each eager and compiled:

- generator: REG of size XL on cached codes, class vectors and targets, as
  `generator:imagenet256_xl`. Forward, velocity losses of tokens and class
  token, alignment, backward, clipping, AdamW, running mean of all parameters.
- tokenizer: the tokenizer of `tokenizer:imagenet256` with the pixel loss alone.
- tokenizer_full: also LPIPS, the alignments with DINOv2-L and I-JEPA-H, and the
  game with the critic: its trunk sees images and reconstructions once each and
  is gone back through once, its heads are trained.

Everything is as a user of torch would write it. Products run in bfloat16 under
autocast, which keeps the residual stream in float32 and takes 16 bits for the
last layers and the embedding of times, where ours are float32. Soft assignments
and losses are float32, without TF32. Frozen networks have weights of 16 bits.
Nothing is computed again in the backward pass (ours: model.remat=False and
model.quantizer_chunk=0).

Left out are reading the data, learning rates that change, and, of the
tokenizer's objective, the entropy of assignments, the transport with its
autoencoder, LeCAM, all augmentation with the consistency that rests on it, and
thereby three forwards of the trunk: reconstructions are shown to it once for
both sides, through the middle of the image. Our step is closest with
loss.kl=loss.transport=loss.lecam=loss.consistency=loss.augment=0; it shows the
trunk one more batch. `tokenizer` is loss.perceptual=loss.adversarial=loss.align
=0 besides. What is left out makes the step of torch the lighter one.

A record of a row is a line of JSON: milliseconds of a step are the median over
rounds of --steps steps, from one synchronisation to the next; parameters are
the trained ones; memory_bytes is the allocator's peak within the rounds, null
on a CPU; warm_up_seconds include the compilation.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity import (
  torch_frozen,
  torch_parts,
  torch_sit,
  torch_tokenizer,
)

LEARNING_RATE, CLIP, DECAY = 1e-4, 1.0, 0.9999
WARM_UP = 3
# What --compile=blocks compiles, each kind once.
BLOCKS = (
  torch_parts.Block,
  torch_sit.Block,
  torch_tokenizer.DecoderBlock,
)

# torch's default.
BACKEND = 'inductor'

Step = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of all networks; the dictionaries hold arguments of their classes.

  `teachers` are those of global and of local tokens.
  """

  generator_batch: int
  generator: dict[str, int]
  tokenizer_batch: int
  tokenizer: dict[str, Any]
  projector_width: int
  teachers: tuple[dict[str, Any], dict[str, Any]]
  trunk: dict[str, Any]
  kernel: int
  vgg: tuple[int, ...]


SIZES = {
  'real': Sizes(
    generator_batch=256,
    generator={
      'num_tokens': 64,
      'token_dim': 32,
      'num_classes': 1000,
      'width': 1152,
      'depth': 28,
      'heads': 16,
      'cls_dim': 768,
      'align_dim': 768,
      'align_depth': 8,
      'projector_width': 2048,
    },
    tokenizer_batch=32,
    tokenizer={
      'image_size': 256,
      'patch_size': 16,
      'num_tokens': 64,
      'token_dim': 32,
      'encoder_width': 768,
      'encoder_depth': 12,
      'decoder_width': 768,
      'decoder_depth': 12,
      'head_dim': 64,
      'layer_scale': 1e-5,
      'codebook_size': 8192,
      'num_codebooks': 4,
      'tau': 0.07,
      'local1d_width': 1024,
      'local2d_width': 384,
      'local2d_depth': 6,
    },
    projector_width=1024,
    teachers=(
      {
        'grid': 16,
        'patch_size': 16,
        'width': 1024,
        'depth': 24,
        'heads': 16,
        'gain': 0.3,
      },
      {
        'grid': 16,
        'patch_size': 14,
        'width': 1280,
        'depth': 32,
        'heads': 16,
        'cls': False,
      },
    ),
    trunk={
      'grid': 14,
      'patch_size': 16,
      'width': 384,
      'depth': 12,
      'heads': 6,
      'gelu': 'tanh',
      'taps': (0, 3, 6, 9, 12),
    },
    kernel=9,
    vgg=(64, 128, 256, 512, 512),
  ),
  # Shows that everything runs; its times mean nothing.
  'tiny': Sizes(
    generator_batch=2,
    generator={
      'num_tokens': 4,
      'token_dim': 4,
      'num_classes': 5,
      'width': 16,
      'depth': 2,
      'heads': 2,
      'cls_dim': 8,
      'align_dim': 8,
      'align_depth': 1,
      'projector_width': 16,
    },
    tokenizer_batch=2,
    tokenizer={
      'image_size': 32,
      'patch_size': 8,
      'num_tokens': 4,
      'token_dim': 4,
      'encoder_width': 16,
      'encoder_depth': 1,
      'decoder_width': 16,
      'decoder_depth': 2,
      'head_dim': 8,
      'layer_scale': 0.1,
      'codebook_size': 8,
      'num_codebooks': 2,
      'tau': 0.07,
      'local1d_width': 16,
      'local2d_width': 16,
      'local2d_depth': 1,
    },
    projector_width=16,
    teachers=(
      {
        'grid': 4,
        'patch_size': 8,
        'width': 16,
        'depth': 1,
        'heads': 2,
        'gain': 0.3,
      },
      {
        'grid': 4,
        'patch_size': 7,
        'width': 24,
        'depth': 1,
        'heads': 2,
        'cls': False,
      },
    ),
    trunk={
      'grid': 3,
      'patch_size': 8,
      'width': 16,
      'depth': 1,
      'heads': 2,
      'gelu': 'tanh',
      'taps': (0, 1),
    },
    kernel=3,
    vgg=(4, 4, 4, 4, 4),
  ),
}


class Trained:
  """A network, its optimiser and, where `has_mean`, its running mean."""

  def __init__(
    self, network: nn.Module, beta2: float, *, has_mean: bool = True
  ):
    self.network = network
    self.parameters = list(network.parameters())
    self._optimizer = torch.optim.AdamW(
      self.parameters,
      lr=LEARNING_RATE,
      betas=(0.9, beta2),
      weight_decay=0.0,
      fused=True,
    )
    self._means = [p.detach().clone() for p in self.parameters if has_mean]

  def update(self, loss: Tensor) -> None:
    """Backward, clipping, one update, and the mean."""
    self._optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
    self._optimizer.step()
    if self._means:
      with torch.no_grad():
        torch._foreach_lerp_(self._means, self.parameters, 1 - DECAY)


@dataclasses.dataclass(frozen=True)
class Row:
  """A training step that is ready to be run.

  Attributes:
    batch_size: images of a step.
    parameters: the number of trained ones.
    step: runs a step and returns the loss of the generator or tokenizer.
  """

  batch_size: int
  parameters: int
  step: Step


def prepare_generator(
  sizes: Sizes, device: torch.device, compiled: str = ''
) -> Row:
  """REG on a cached batch. `compiled` is '', 'whole' or 'blocks'."""
  fields, b = sizes.generator, sizes.generator_batch
  with device:
    trained = Trained(torch_sit.SiT(**fields), beta2=0.999)
    codes = torch.randn(b, fields['num_tokens'], fields['token_dim'])
    cls = torch.randn(b, fields['cls_dim'])
    targets = torch.randn(b, fields['num_tokens'], fields['align_dim'])
    labels = torch.randint(fields['num_classes'], (b,))
  batch = codes, labels, cls, F.normalize(targets, dim=-1)
  network = trained.network
  loss_of = functools.partial(_compiled(generator_loss, compiled), network)
  _compile_blocks(network, compiled)

  def step() -> Tensor:
    with torch.autocast(device.type, torch.bfloat16):
      loss = loss_of(*batch)
    trained.update(loss)
    return loss.detach()

  return Row(b, torch_parts.count(network), step)


def generator_loss(
  network: nn.Module,
  codes: Tensor,
  labels: Tensor,
  cls: Tensor | None = None,
  targets: Tensor | None = None,
  *,
  label_dropout: float = 0.1,
) -> Tensor:
  """The loss of SiT or, with a class token and targets, of REG.

  Args:
    network: a SiT.
    codes: normalised tokens [b, k, e].
    labels: classes [b].
    cls: the teacher's class vectors [b, c].
    targets: vectors of length 1 or less [b, k, c] to align with.
    label_dropout: share of labels that are replaced by the null label.
  """
  b = len(codes)
  t, kept = torch.rand(2, b, device=codes.device)
  labels = torch.where(kept >= label_dropout, labels, network.num_classes)
  noise = torch.randn_like(codes)
  mixed = torch.lerp(codes, noise, t[:, None, None])
  if cls is None or targets is None:
    return F.mse_loss(network(mixed, t, labels).tokens, noise - codes)
  cls_noise = torch.randn_like(cls)
  cls_mixed = torch.lerp(cls, cls_noise, t[:, None])
  output = network(mixed, t, labels, cls_mixed)
  return (
    F.mse_loss(output.tokens, noise - codes)
    + 0.03 * F.mse_loss(output.cls, cls_noise - cls)
    + 0.5 * aligned_loss(output.aligned, cls, targets)
  )


def aligned_loss(aligned: Tensor, cls: Tensor, targets: Tensor) -> Tensor:
  """Minus the mean cosine over [class token; tokens]."""
  wanted = torch.cat([F.normalize(cls, dim=-1)[:, None], targets], dim=1)
  return -(wanted * F.normalize(aligned.float(), dim=-1)).sum(-1).mean()


def prepare_tokenizer(
  sizes: Sizes, device: torch.device, compiled: str = ''
) -> Row:
  """The tokenizer with the pixel loss. `compiled`: '', 'whole' or 'blocks'."""
  with device:
    trained = Trained(torch_tokenizer.Tokenizer(**sizes.tokenizer), beta2=0.95)
    images = _images(sizes)
  network = trained.network

  def loss_of(images: Tensor) -> Tensor:
    return F.mse_loss(network(images).reconstruction, images)

  loss_of = _compiled(loss_of, compiled)
  _compile_blocks(network, compiled)

  def step() -> Tensor:
    with torch.autocast(device.type, torch.bfloat16):
      loss = loss_of(images)
    trained.update(loss)
    return loss.detach()

  return Row(len(images), torch_parts.count(network), step)


class WithHeads(nn.Module):
  """A tokenizer, and heads that carry its tokens to the teachers' widths."""

  def __init__(self, sizes: Sizes):
    super().__init__()
    self.tokenizer = torch_tokenizer.Tokenizer(**sizes.tokenizer)
    self.repa_global, self.repa_local = (
      torch_parts.Projector(
        sizes.tokenizer['token_dim'], teacher['width'], sizes.projector_width
      )
      for teacher in sizes.teachers
    )


def make_heads(sizes: Sizes) -> torch_frozen.Heads:
  """The trained part of the critic."""
  trunk = sizes.trunk
  return torch_frozen.Heads(len(trunk['taps']), trunk['width'], sizes.kernel)


def prepare_tokenizer_full(
  sizes: Sizes, device: torch.device, compiled: str = ''
) -> Row:
  """The tokenizer with teachers, LPIPS and critic; `compiled` as above.

  Teachers stand outside of what is compiled as a whole: theirs are always
  compiled block by block.
  """
  with device:
    trained = Trained(WithHeads(sizes), beta2=0.95)
    critic = Trained(make_heads(sizes), beta2=0.95, has_mean=False)
    teachers = [_frozen(torch_frozen.Vit(**t)) for t in sizes.teachers]
    trunk = _frozen(torch_frozen.Vit(**sizes.trunk, cuts=True))
    lpips = _frozen(torch_frozen.Lpips(sizes.vgg))
    lpips.to(memory_format=torch.channels_last)
    images = _images(sizes)
  network, heads = trained.network, critic.network

  def loss_of(
    images: Tensor, first: Tensor, second: Tensor
  ) -> tuple[Tensor, list[Tensor]]:
    output = network.tokenizer(images)
    fake = output.reconstruction.float()
    with torch.autocast(device.type, enabled=False):
      distance = lpips(fake, images)
      taps = trunk(fake)
    loss = (
      F.mse_loss(fake, images)
      + distance
      - 0.2 * heads(taps).mean()
      + 0.1 * repa_loss(network.repa_global(output.tokens), first)
      + 0.1 * repa_loss(network.repa_local(output.local1d), second)
    )
    return loss, [tap.detach() for tap in taps]

  def critic_loss_of(images: Tensor, fake: list[Tensor]) -> Tensor:
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
      taps = trunk(images)
    real_part = F.relu(1 - heads(taps)).mean()
    return 0.2 * 0.5 * (real_part + F.relu(1 + heads(fake)).mean())

  loss_of = _compiled(loss_of, compiled)
  critic_loss_of = _compiled(critic_loss_of, compiled)
  for module in (network, trunk):
    _compile_blocks(module, compiled)
  for teacher in teachers:
    _compile_blocks(teacher, 'blocks' if compiled else '')

  def step() -> Tensor:
    with torch.no_grad():
      targets = [teacher(images) for teacher in teachers]
    # The tokenizer's loss passes through the heads and does not train them.
    heads.requires_grad_(False)
    with torch.autocast(device.type, torch.bfloat16):
      loss, fake = loss_of(images, *targets)
    trained.update(loss)
    heads.requires_grad_(True)
    with torch.autocast(device.type, torch.bfloat16):
      game = critic_loss_of(images, fake)
    critic.update(game)
    return loss.detach() + 0 * game.detach()

  both = torch_parts.count(network) + torch_parts.count(heads)
  return Row(len(images), both, step)


def repa_loss(tokens: Tensor, patches: Tensor) -> Tensor:
  """Minus the mean cosine of tokens and their consecutive patches."""
  b, k, d = tokens.shape
  wanted = F.normalize(patches.float(), dim=-1)
  wanted = wanted.view(b, k, -1, d).mean(dim=2)
  return -(wanted * F.normalize(tokens.float(), dim=-1)).sum(-1).mean()


PREPARE: dict[str, Callable[[Sizes, torch.device, str], Row]] = {
  'generator': prepare_generator,
  'tokenizer': prepare_tokenizer,
  'tokenizer_full': prepare_tokenizer_full,
}


def _images(sizes: Sizes) -> Tensor:
  side = sizes.tokenizer['image_size']
  return 2 * torch.rand(sizes.tokenizer_batch, 3, side, side) - 1


def _frozen(network: nn.Module) -> nn.Module:
  return network.to(torch.bfloat16).requires_grad_(False)


def _compiled(function: Callable[..., Any], how: str) -> Callable[..., Any]:
  if how != 'whole':
    return function
  return torch.compile(function, dynamic=False, backend=BACKEND)


def _compile_blocks(network: nn.Module, how: str) -> None:
  """Compiles the repeated parts, where `how` is 'blocks'."""
  if how == 'blocks':
    for module in network.modules():
      # A decoder's block is compiled with the block that it holds.
      if isinstance(module, BLOCKS):
        module.compile(dynamic=False, backend=BACKEND)


class OutOfTime(BaseException):
  """The time of all rows is used up.

  No Exception, which the compiler would take for a failure of its own.
  """


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
  """Raises OutOfTime in the block after so many seconds."""

  def stop(*_: Any) -> None:
    raise OutOfTime

  before = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def measure(
  row: Row, device: torch.device, steps: int, rounds: int
) -> dict[str, Any]:
  """Times a row's step: what its record says of time and memory."""
  on_gpu = device.type == 'cuda'

  def wait() -> None:
    if on_gpu:
      torch.cuda.synchronize()

  began = time.perf_counter()
  for _ in range(WARM_UP):
    loss = row.step()
  wait()
  warm_up = time.perf_counter() - began
  if on_gpu:
    torch.cuda.reset_peak_memory_stats()
  taken = []
  for _ in range(rounds):
    began = time.perf_counter()
    for _ in range(steps):
      loss = row.step()
    wait()
    taken.append((time.perf_counter() - began) / steps)
  if not loss.isfinite():
    raise RuntimeError(f'the loss became {loss.item()}')
  seconds = statistics.median(taken)
  return {
    'step_ms': 1e3 * seconds,
    'step_ms_least': 1e3 * min(taken),
    'step_ms_most': 1e3 * max(taken),
    'images_per_second': row.batch_size / seconds,
    'parameters': row.parameters,
    'memory_bytes': torch.cuda.max_memory_allocated() if on_gpu else None,
    'warm_up_seconds': warm_up,
    'loss': loss.item(),
  }


def run(
  names: list[str],
  ways: list[str],
  *,
  size: str,
  device: torch.device,
  steps: int,
  rounds: int,
  seconds: float,
) -> Iterator[dict[str, Any]]:
  """Measures row after row, the eager ones first, and yields their records.

  Args:
    names: keys of PREPARE.
    ways: '' for eager; 'whole' or 'blocks' for what is compiled.
    size: a key of SIZES.
    device: a GPU or CPU.
    steps: in a round.
    rounds: their median is reported.
    seconds: for all rows. One that is not done by then is stopped, and its
      record and those of all behind it say 'skipped'; so does that of a row
      that fails.
  """
  ends = time.monotonic() + seconds
  torch.set_float32_matmul_precision('highest')
  torch.backends.cudnn.allow_tf32 = False
  # Shapes never change, so the fastest convolution is worth a search.
  torch.backends.cudnn.benchmark = True
  on_gpu = device.type == 'cuda'
  about = {
    'size': size,
    'torch': torch.__version__,
    'device': torch.cuda.get_device_name() if on_gpu else 'cpu',
  }
  for way in ways:
    for name in names:
      record = {
        'name': name,
        'framework': 'torch',
        'compiled': bool(way),
        'compiled_parts': way,
        **about,
      }
      left = ends - time.monotonic()
      try:
        if left <= 0:
          raise OutOfTime
        with _limit(left):
          torch.manual_seed(0)
          row = PREPARE[name](SIZES[size], device, way)
          record['batch_size'] = row.batch_size
          record |= measure(row, device, steps, rounds)
      except OutOfTime:
        record['skipped'] = f'not done within --seconds={seconds:g}'
      except (RuntimeError, ImportError, OSError) as error:
        first = (str(error).strip().splitlines() or [''])[0]
        record['skipped'] = f'{type(error).__name__}: {first}'
        record['failed'] = True
      yield record
      row = None
      torch.compiler.reset()
      gc.collect()
      if on_gpu:
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
  """Measures, prints and writes; 1 if a row failed, 0 otherwise."""
  options = _parse(arguments)
  failed = False
  with contextlib.ExitStack() as stack:
    outputs = [sys.stdout]
    if options.out:
      outputs.append(stack.enter_context(open(options.out, 'w')))
    for record in run(
      [options.only] if options.only else list(PREPARE),
      {'no': [''], 'only': [options.compile], 'too': ['', options.compile]}[
        options.compiled
      ],
      size=options.size,
      device=torch.device(options.device),
      steps=options.steps,
      rounds=options.rounds,
      seconds=options.seconds,
    ):
      failed |= 'failed' in record
      for output in outputs:
        # At once, so that a run that is killed keeps its rows.
        output.write(json.dumps(record) + '\n')
        output.flush()
  return int(failed)


def _parse(arguments: list[str]) -> argparse.Namespace:
  has_gpu = torch.cuda.is_available()
  parser = argparse.ArgumentParser('python -m tests.parity.torch_steps')
  add = parser.add_argument
  add('--steps', type=int, default=10, help='steps in a round')
  add('--rounds', type=int, default=5, help='medians of them are reported')
  add('--out', default='', help='file for the records, one a line')
  add('--only', choices=list(PREPARE), help='one of the rows')
  add(
    '--seconds', type=float, default=600.0, help='for all rows, start excluded'
  )
  add('--compiled', choices=['too', 'no', 'only'], default='too')
  add('--compile', choices=['whole', 'blocks'], default='whole')
  add('--device', choices=['cuda', 'cpu'], default='cuda' if has_gpu else 'cpu')
  add('--size', choices=list(SIZES), default='real' if has_gpu else 'tiny')
  options = parser.parse_args(arguments)
  for name in ('steps', 'rounds'):
    value = getattr(options, name)
    if value < 1:
      parser.error(f'--{name}={value}; wanted 1 or more')
  if options.seconds <= 0:
    parser.error(f'--seconds={options.seconds:g}; wanted a number above 0')
  if options.device == 'cuda' and not has_gpu:
    parser.error('--device=cuda, and torch finds no GPU; use --device=cpu')
  folder = os.path.dirname(options.out) or '.'
  if options.out and (os.path.isdir(options.out) or not os.path.isdir(folder)):
    parser.error(f'--out={options.out}; wanted a file in a folder that exists')
  return options


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
