"""Settings of a scoring; empty values are those of the training.

Use as configs/evaluate.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The configuration of `stages.score`."""
  config = ml_collections.ConfigDict()
  # Images that a tokenizer reconstructs, or samples are compared with.
  config.data = ml_collections.ConfigDict()
  config.data.source = ''
  config.data.path = ''
  # The split that is read of every set of images that has splits.
  config.data.split = 'val'
  config.data.num_images = 0  # 0 is all
  config.data.batch_size = 64
  config.data.num_threads = -1  # by the cores
  # Resize of Inception and parts of the inception score: adm, pytorch_fid or
  # torch_fidelity.
  config.convention = 'adm'
  # How many samples a generator makes, and whether their classes are 'random'
  # or 'balanced'.
  config.num_samples = 1_000
  config.labels = 'random'
  # Scales of guidance, each with scores; () is that of the training.
  config.guidance_scales = ()
  config.seed = 0
  return config
