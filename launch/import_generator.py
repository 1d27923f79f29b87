"""Turns a released generator into a run: SiT, REPA, REG, LightningDiT, SoftVQ.

  python -m launch.import_generator --network=sit_xl2:FILE --workdir=runs/sit
  python -m launch.sample --workdir=runs/sit --tokenizer=sdvae --out=samples

The network is one of `released_generators.RELEASED`, or one of these with a
source: NAME:FILE, NAME:FOLDER, NAME:ORG/REPO. A source may be of another size.
Sampling, scoring and fine-tuning take the workdir like that of any generator.
"""

from launch import cli
from selfboottok_jax import files, inference
from selfboottok_jax.stages import import_run

FLAGS = cli.Flags()
_NETWORK = FLAGS.string('network', '', 'NAME or NAME:SOURCE.')
_WORKDIR = FLAGS.string('workdir', '', 'Where the run is written.')
_TOKENIZER = FLAGS.string(
  'tokenizer', '', 'Run or autoencoder of its codes, if not the published.'
)
_HEADS = FLAGS.integer(
  'heads', 0, 'Attention heads, of a width that none was published of.'
)


def main() -> None:
  """Imports the network that the flags name."""
  spec, workdir = _NETWORK.value, _WORKDIR.value
  cli.require(network=spec, workdir=workdir)
  files.check_folder('workdir', workdir)
  cli.start_jax()
  run = import_run.import_generator(
    spec, workdir, tokenizer=_TOKENIZER.value, heads=_HEADS.value
  )
  model, sampling = run.model, inference.Sampling(**run.config['sampling'])
  cli.say(
    f'{workdir}: {run.num_parameters / 1e6:.1f}M parameters, '
    f'{model.num_tokens} tokens of {model.token_dim}, {model.num_classes} '
    f'classes; sampled by {sampling.describe()}'
  )


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
