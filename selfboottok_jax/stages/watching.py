"""What is measured of a tokenizer while it trains, from its configuration.

`evaluation.perceptual` and `evaluation.frechet` name a network as
`pretrained.load_perceptual` and `pretrained.load_network` take it, '' for none,
or 'auto' for the cheapest trained one whose weights are on this machine.
"""

import ml_collections
from jax.sharding import Mesh

from selfboottok_jax import data, errors, pretrained
from selfboottok_jax.evaluation import reconstruction, watch
from selfboottok_jax.models import tokenizer as tokenizer_lib
from selfboottok_jax.stages import generator_stage, inputs

# In progress lines.
SHOWN = {'PSNR': 'train/psnr', 'val PSNR': 'val/psnr'}
AUTO = 'auto'
# What 'auto' chooses from, the cheapest first.
PERCEPTUALS = ('lpips_squeeze', 'lpips_alex', 'lpips_vgg')
FEATURES = ('mobilenet_v2', 'inception')


def held_out(
  config: ml_collections.ConfigDict,
  model: tokenizer_lib.Tokenizer,
  train: data.Source,
  mesh: Mesh,
) -> tuple[list[data.EvalBatches], reconstruction.Reconstruction]:
  """Opens held-out images, and what is measured on them.

  Call it when the networks of the training are loaded: what they fetched is on
  this machine then.

  Raises:
    ConfigError: too few images for a Frechet distance.
    UserError: a network that does not exist, or lacks weights.
  """
  val = inputs.open_val(config, train)
  # Mixed: the first batch is shown, and its mean stands in for tokens.
  batches = inputs.eval_batches(config, val, mesh, mixed=True)
  observers: list[reconstruction.Observer] = [watch.Grid()]
  if spec := choose(config.evaluation.perceptual, PERCEPTUALS, config):
    distance = pretrained.load_perceptual(spec)
    observers.append(watch.Perceptual(distance, mesh))
  if spec := choose(config.evaluation.frechet, FEATURES, config):
    network = generator_stage.load_frechet(spec, model.patch_size)
    if batches.count < 2:
      raise errors.ConfigError(
        f'evaluation.frechet={spec} with {batches.count} held-out images; '
        "wanted 2 or more, for a covariance, or --config.evaluation.frechet=''"
      )
    observers.append(watch.Frechet(network, mesh))
  return [batches], reconstruction.Reconstruction(
    model, batches, mesh, leave_out=True, observers=observers
  )


def choose(
  wanted: str, names: tuple[str, ...], config: ml_collections.ConfigDict
) -> str:
  """Returns the network that a key of `evaluation` asks for, '' for none.

  Args:
    wanted: the key's value.
    names: what AUTO chooses from. A network that `config.networks` names with
      a source has that source.
    config: of the training.
  """
  if wanted != AUTO:
    return wanted
  sources = {spec.partition(':')[0]: spec for spec in config.networks.values()}
  specs = (sources.get(name, name) for name in names)
  return next(filter(pretrained.is_at_hand, specs), '')
