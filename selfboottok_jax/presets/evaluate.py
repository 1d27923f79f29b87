"""Settings of a scoring; empty values are those of the training.

Use as configs/evaluate.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The configuration of `stages.score.score_run`."""
  config = ml_collections.ConfigDict()
  config.data = ml_collections.ConfigDict()
  config.data.source = ''
  config.data.path = ''
  config.data.split = 'val'
  config.data.num_images = 0  # 0 is all
  config.data.batch_size = 64
  config.data.num_threads = -1  # by the cores
  config.networks = ml_collections.ConfigDict()
  # A perceptual distance to report too, as 'lpips_squeeze:PATH'; '' is none.
  config.networks.perceptual = ''
  # Features of the Frechet distance of samples, as 'mobilenet_v2:PATH'.
  config.networks.frechet = 'hog'
  # Of a generator.
  config.num_samples = 1_000
  # Scales of guidance, each with a score; () is that of the training.
  config.guidance_scales = ()
  config.seed = 0
  return config
