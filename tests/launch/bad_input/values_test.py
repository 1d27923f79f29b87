import pytest

from selfboottok_jax import trees
from selfboottok_jax.presets import generator, scaling, tokenizer
from selfboottok_jax.stages import checks
from tests.launch.bad_input.arguments import (
  EVALUATE,
  EVALUATE_GENERATOR,
  GENERATOR,
  SAMPLE,
  SCALING,
  TOKENIZER,
  TRAIN,
  TRAIN_GENERATOR,
  WORKDIR,
)

# A command, and what its line must say: what was given, and what was wanted.
CASES = {
  'image size': (
    (*TRAIN, '--config.data.image_size=20'),
    ('data.image_size=20', 'model.patch_size=8'),
  ),
  'tokens': (
    (*TRAIN, '--config.model.num_tokens=5'),
    ('model.num_tokens=5', 'model.num_codebooks=2'),
  ),
  'chunk of a quantiser': (
    (*TRAIN, '--config.model.quantizer_chunk=3'),
    ('model.quantizer_chunk=3', '2 tokens of each codebook'),
  ),
  'batch of 0': (
    (*TRAIN, '--config.data.batch_size=0'),
    ('data.batch_size=0', 'positive'),
  ),
  'negative batch': (
    (*TRAIN, '--config.data.batch_size=-4'),
    ('data.batch_size=-4', 'positive'),
  ),
  'evaluation batch': (
    (*TRAIN, '--config.evaluation.batch_size=0'),
    ('evaluation.batch_size=0', 'positive'),
  ),
  'steps': ((*TRAIN, '--config.train.steps=0'), ('train.steps=0', '1 or more')),
  'seed': ((*TRAIN, '--config.train.seed=-1'), ('train.seed=-1', '0 or more')),
  'depth': (
    (*TRAIN, '--config.model.encoder_depth=0'),
    ('model.encoder_depth=0', '1 or more'),
  ),
  'number type': (
    (*TRAIN, '--config.model.dtype=float99'),
    ("model.dtype='float99'", 'bfloat16'),
  ),
  'decay': (
    (*TRAIN, '--config.train.ema=1'),
    ('train.ema=1', 'from 0 to below 1'),
  ),
  'warm-up': (
    (*TRAIN, '--config.optimizer.warmup=2'),
    ('optimizer.warmup=2', 'from 0 to 1'),
  ),
  'label dropout': (
    (*TRAIN_GENERATOR, '--config.model.label_dropout=-.1'),
    ('model.label_dropout=-0.1', 'from 0 to 1'),
  ),
  'weight of a loss': (
    (*TRAIN, '--config.loss.kl=-1'),
    ('loss.kl=-1', '0 or more'),
  ),
  'rate': (
    (*TRAIN, '--config.optimizer.learning_rate=0'),
    ('optimizer.learning_rate=0', 'above 0'),
  ),
  'checkpoints': (
    (*TRAIN, '--config.checkpoint.max_to_keep=0'),
    ('checkpoint.max_to_keep=0', '1 or more'),
  ),
  'mesh': (
    (*TRAIN, '--config.mesh.fsdp=3'),
    ('mesh.fsdp=3', 'mesh.data=-1'),
  ),
  'discriminator': (
    (*TRAIN, '--config.discriminator.kind=nope'),
    ("discriminator.kind='nope'", 'dino, stylegan'),
  ),
  'kernel of a discriminator': (
    (
      *TRAIN, '--config.discriminator.kind=dino',
      '--config.discriminator.dino.kernel=2',
    ),
    ('discriminator.dino.kernel=2', 'an odd number'),
  ),
  'trunk of a discriminator': (
    (
      *TRAIN, '--config.discriminator.kind=dino',
      '--config.networks.discriminator=nope',
    ),
    ("'nope'", 'dino_s16'),
  ),
  'probability of augmentation': (
    (*TRAIN, '--config.loss.augment=2'),
    ('loss.augment=2', 'from 0 to 1'),
  ),
  'unknown network': (
    (*TRAIN, '--config.networks.perceptual=nope'),
    ("'nope'", 'hog, random, lpips_squeeze'),
  ),
  'no weight file': (
    (*TRAIN, '--config.networks.repa_global=mobilenet_v2:/nope.npz'),
    ('/nope.npz', 'mobilenet_v2'),
  ),
  'weight file not named': (
    (*TRAIN, '--config.networks.repa_global=mobilenet_v2'),
    ('mobilenet_v2:FILE', 'mobilenet_v2:random'),
  ),
  'heads': (
    (*TRAIN_GENERATOR, '--config.model.heads=3'),
    ('model.width=16', 'model.heads=3'),
  ),
  'sampler of a config': (
    (*TRAIN_GENERATOR, '--config.sampling.sampler=nope'),
    ("sampling.sampler='nope'", 'sde, ode, heun'),
  ),
  'guidance of a config': (
    (*TRAIN_GENERATOR, '--config.sampling.guidance_low=.9'),
    ('sampling.guidance_low=0.9', 'low <= high'),
  ),
  'assumed tokenizer': (
    ('train', GENERATOR, '--dry_run', '--config.assumed.tokenizer=nope'),
    ("assumed.tokenizer='nope'", 'imagenet256'),
  ),
  'other images than the assumed tokenizer': (
    ('train', GENERATOR, '--dry_run', '--config.data.image_size=32'),
    ('data.image_size=32', '--config.data.image_size=16'),
  ),
  'assumed classes': (
    (*TRAIN, '--config.assumed.num_classes=0'),
    ('assumed.num_classes=0', '1 or more'),
  ),
  'trainable': (
    (
      'train', SCALING, WORKDIR, '--config.tokenizer={runs}/tokenizer',
      "--config.trainable=('nope',)",
    ),
    ('nope', 'local2d'),
  ),
  'label': ((*SAMPLE, '--labels=3,99'), ("'99'", 'from 0 to 9')),
  'negative label': ((*SAMPLE, '--labels=-1'), ("'-1'", 'from 0 to 9')),
  'word for a label': ((*SAMPLE, '--labels=cat'), ("'cat'", 'integers')),
  'no label': ((*SAMPLE, '--labels='), ('--labels=', 'integers')),
  'sampler': ((*SAMPLE, '--sampler=nope'), ("'nope'", 'sde, ode, heun')),
  'sampler steps': ((*SAMPLE, '--num_steps=0'), ('num_steps=0', '1 step')),
  'guidance': (
    (*SAMPLE, '--guidance_low=.8', '--guidance_high=.3'),
    ('guidance_low=0.8', 'low <= high'),
  ),
  'no guidance scale': (
    (*SAMPLE, '--guidance_scale=2,big'),
    ('--guidance_scale=2,big', 'wanted a number'),
  ),
  'the same scale twice': (
    (*SAMPLE, '--guidance_scale=2,2'),
    ('--guidance_scale=2,2', 'different'),
  ),
  'nothing kept': ((*SAMPLE, '--nopng'), ('--nopng', '--npz')),
  'channels': (
    (*TRAIN_GENERATOR, '--config.sampling.guided_channels=-1'),
    ('sampling.guided_channels=-1', 'wanted 0 (all) or more'),
  ),
  'norm': (
    (*TRAIN_GENERATOR, '--config.model.norm=batch'),
    ("model.norm='batch'", 'layer, rms'),
  ),
  'alignment': (
    (*TRAIN_GENERATOR, '--config.loss.align_mode=each'),
    ("loss.align_mode='each'", 'repeat, pool, global, cls_only, off'),
  ),
  'depth of the alignment': (
    (*TRAIN_GENERATOR, '--config.model.align_depth=9'),
    ('model.align_depth=9', '1 to model.depth=2'),
  ),
  'teacher': (
    (*TRAIN_GENERATOR, '--config.networks.teacher=nope'),
    ("'nope'", 'hog'),
  ),
  'teacher without a class vector': (
    (*TRAIN_GENERATOR, '--config.networks.teacher=dct'),
    ('dct', 'no class vector', 'loss.cls=0'),
  ),
  'guidance scale': ((*SAMPLE, '--guidance_scale=nan'), ('nan', 'finite')),
  'scored samples': (
    (*EVALUATE_GENERATOR, '--config.num_samples=0'),
    ('num_samples=0', '2 or more'),
  ),
  'attention': (
    (*TRAIN, '--config.model.attention=cudnn'),
    ('model.attention=cudnn', 'a GPU'),
  ),
  'sampling seed': ((*SAMPLE, '--seed=-1'), ('seed=-1', '0 or more')),
  'samples': ((*SAMPLE, '--num_samples=0'), ('--num_samples=0', '1 or more')),
  'sampling batch': (
    (*SAMPLE, '--batch_size=-1'),
    ('--batch_size=-1', '0 or more'),
  ),
  'large sampling seed': (
    (*SAMPLE, '--seed=4294967296'),
    ('--seed=4294967296', 'less than'),
  ),
  'split': ((*EVALUATE, '--config.data.split=nope'), ("'nope'", 'train, val')),
  'images': (
    (*EVALUATE, '--config.data.num_images=-1'),
    ('data.num_images=-1', '0 (all)'),
  ),
  'distance': (
    (*EVALUATE, '--metrics=lpips_sqeeze'),
    ("'lpips_sqeeze'", 'lpips_squeeze'),
  ),
  'features': (
    (*EVALUATE_GENERATOR, '--metrics=fd_mobilenet'),
    ("'fd_mobilenet'", 'fd_mobilenet_v2'),
  ),
}  # fmt: skip


# Each takes a process. tests/stages/checks_test.py has more without one.
@pytest.mark.parametrize(
  'first',
  [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 4))],
)
def test_values(refused, first):
  names = list(CASES)[first::4]
  refused({name: CASES[name] for name in names})


def test_batch_that_devices_cannot_share(server, tmp_path):
  devices = '--xla_force_host_platform_device_count=3'
  result = server.run(
    'train', TOKENIZER, f'--workdir={tmp_path / "new"}', XLA_FLAGS=devices
  )
  assert 'data.batch_size=4 does not divide over 3 devices' in result.error
  assert not (tmp_path / 'new').exists()


def test_limits_name_keys_that_there_are():
  known = set()
  for module in (tokenizer, scaling, generator):
    for preset in module.PRESETS:
      config = module.get_config(preset)
      checks.check(config)
      known |= trees.flatten(config.to_dict()).keys()
  assert set(checks.LEAST) <= known
