"""Turns a released SoftVQ-VAE into a run: the baseline, with published weights.

  python -m launch.import_softvq --network=softvq_b64 --workdir=runs/softvq_b64

The network is softvq_b64, softvq_bl64 or softvq_l64, from the hub, or one of
these or 'softvq' with a source: softvq:FILE, softvq:FOLDER, softvq:ORG/REPO.
Scoring, generators and fine-tuning take the workdir like that of any stage 1.
"""

from launch import cli
from selfboottok_jax import files
from selfboottok_jax.stages import import_run

FLAGS = cli.Flags()
_NETWORK = FLAGS.string('network', '', 'NAME or NAME:SOURCE.')
_WORKDIR = FLAGS.string('workdir', '', 'Where the run is written.')


def main() -> None:
  """Imports the network that the flags name."""
  spec, workdir = _NETWORK.value, _WORKDIR.value
  cli.require(network=spec, workdir=workdir)
  files.check_folder('workdir', workdir)
  cli.start_jax()
  run = import_run.import_softvq(spec, workdir)
  model = run.model
  cli.say(
    f'{workdir}: {run.num_parameters / 1e6:.1f}M parameters, images of '
    f'{model.image_size}, {model.num_tokens} tokens of {model.token_dim}, '
    f'tau {model.tau}'
  )


if __name__ == '__main__':
  cli.run(main, FLAGS, continues=False)
