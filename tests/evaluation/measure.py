"""Scores photographs, perhaps in one of several processes.

python -m tests.evaluation.measure [--multihost] SPEC PHOTOS REFERENCE \
  BATCH_SIZE COUNT OUT
"""

import json
import pathlib
import resource
import sys

import jax

from launch import cli
from selfboottok_jax import data
from selfboottok_jax.evaluation import references, set_scores
from selfboottok_jax.training import sharding


def main() -> None:
  """Measures centre crops of 64 pixels; the first process writes the scores."""
  together = sys.argv[1] == '--multihost'
  spec, photos, reference, size, count, out = sys.argv[1 + together :]
  cli.start_jax(multihost=together)
  network = spec.partition(':')[0]
  measurement = set_scores.SetMeasurement(
    [spec], (f'fd_{network}', 'precision', 'recall'), sharding.make_mesh()
  )
  batches = data.make_eval_dataset(
    data.open_source('auto', photos, 'train', 64),
    batch_size=int(size),
    image_size=64,
    num_images=int(count),
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  for batch in batches:
    measurement.add(batch)
  found = measurement.finish(
    references.open_reference(
      reference,
      measurement.wanted,
      image_size=64,
      batch_size=int(size),
      num_images=int(count),
      # A folder of its own: as on hosts without a common disk.
      cache=f'{out}.{jax.process_index()}',
    )
  )
  found = {metric: value for metric, value, _ in found}
  found['peak_mib'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  found['devices'] = jax.device_count()
  if jax.process_index() == 0:
    pathlib.Path(out).write_text(json.dumps(found))


if __name__ == '__main__':
  main()
