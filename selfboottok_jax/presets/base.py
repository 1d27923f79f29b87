"""What every configuration has, with the values that most share."""

import ml_collections


def get_base(task: str) -> ml_collections.ConfigDict:
  """The keys that all tasks read."""
  config = ml_collections.ConfigDict()
  config.task = task
  # Workdir of a tokenizer run; stage 1 has none.
  config.tokenizer = ''
  # Workdir of a run of the same task to fine-tune from; '' starts fresh.
  config.init_from = ''

  config.data = ml_collections.ConfigDict()
  config.data.source = 'auto'  # folder, tar, procedural; auto goes by the path
  config.data.path = ''
  config.data.batch_size = 256  # global, over all processes and devices
  config.data.image_size = 256
  config.data.random_crop = True  # of a random scale; else the centre
  config.data.flip = True  # every other picture
  config.data.num_threads = 4  # decoding threads of each process
  config.data.num_workers = 0  # decoding processes beside them

  config.train = ml_collections.ConfigDict()
  config.train.steps = 250_000
  config.train.seed = 0
  config.train.ema = 0.9999
  config.train.log_every = 100

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-4
  config.optimizer.schedule = 'cosine'
  config.optimizer.warmup = 0.02  # fraction of train.steps
  config.optimizer.final = 0.1  # fraction of the rate
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.epsilon = 1e-8
  config.optimizer.weight_decay = 0.0
  config.optimizer.clip_norm = 1.0

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.every = 5_000
  config.evaluation.num_images = 5_000  # 0 is all
  config.evaluation.batch_size = 64

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every = 5_000
  config.checkpoint.max_to_keep = 2

  # What a dry run or a benchmark supposes where nothing is given.
  config.assumed = ml_collections.ConfigDict()
  config.assumed.num_classes = 1_000
  config.assumed.tokenizer = ''  # a preset of configs/tokenizer.py

  config.mesh = ml_collections.ConfigDict()
  config.mesh.data = -1  # -1 is all devices that fsdp leaves
  config.mesh.fsdp = 1
  return config


def choose(presets, preset: str, file: str):
  """The function of a preset, or one line that lists the presets."""
  if preset not in presets:
    raise ValueError(
      f'{file} has no preset {preset!r}; choose one of {", ".join(presets)}'
    )
  return presets[preset]
