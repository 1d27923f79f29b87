r"""Checks photographs, or makes a data set of them that trains at any size.

  python -m launch.prepare --path=PHOTOS --check --report=report.json
  python -m launch.prepare --path=PHOTOS --out=DATA/mine --skip_bad
  python -m launch.prepare \
    --path=ILSVRC2012_img_train.tar,ILSVRC2012_img_val.tar \
    --labels=ILSVRC2012_devkit_t12.tar.gz --out=DATA/imagenet --resize=320

A training takes it as --config.data.path=DATA/mine. A command that was stopped
continues when it is given again.
"""

from typing import Any

from launch import cli
from selfboottok_jax import data, errors, files
from selfboottok_jax.data import cores, prepare, token_cache

FLAGS = cli.Flags()
_PATH = FLAGS.string(
  'path',
  '',
  'Photographs in any form of docs/data.md: a folder, a tar, or two with a '
  'comma between, of which one has train and one val in its name; shards, '
  'Parquet, tfds:NAME.',
)
_SOURCE = FLAGS.string(
  'source', 'auto', f'Form of --path: {", ".join(data.SOURCES)}.'
)
_LABELS = FLAGS.strings(
  'labels', [], 'Classes of val images that lie in one folder: label files.'
)
_CHECK = FLAGS.switch('check', False, 'Read all, and write only the report.')
_REPORT = FLAGS.string('report', '', 'JSON file of what is there and is bad.')
_OUT = FLAGS.string('out', '', 'Folder of the new data set.')
_RESIZE = FLAGS.integer(
  'resize',
  0,
  'Shorter side that larger images get; 0 stores files as they are.',
)
_QUALITY = FLAGS.integer('quality', 95, 'Of the JPEGs that --resize makes.')
_SKIP_BAD = FLAGS.switch(
  'skip_bad', False, 'Leave out images that cannot be read.'
)
_MOST_BAD = FLAGS.number('most_bad', 0.01, 'Share of such images to allow.')
_EXIF = FLAGS.switch('exif', True, 'Turn images upright, as data.exif.')
_MAX_PIXELS = FLAGS.integer(
  'max_pixels', data.Options().max_pixels, 'As data.max_pixels.'
)
_NUM_WORKERS = FLAGS.integer('num_workers', 0, 'Processes; 0 is by the cores.')


def main() -> None:
  """Checks or prepares."""
  cli.require(path=_PATH.value)
  if _CHECK.value == bool(_OUT.value):
    given = '--check and --out' if _CHECK.value else 'neither --check nor --out'
    raise errors.ConfigError(
      f'{given} given; wanted --check, or --out=FOLDER to make a data set'
    )
  cli.check_least(_NUM_WORKERS, 0)
  cli.check_least(_MAX_PIXELS, 1)
  if not 0 <= _MOST_BAD.value <= 1:
    raise errors.ConfigError(f'--most_bad={_MOST_BAD.value}; wanted 0 to 1')
  if _REPORT.value:
    files.check_folder('report', files.as_path(_REPORT.value).parent)
    if files.as_path(_REPORT.value).is_dir():
      raise errors.ConfigError(
        f'--report={_REPORT.value} is a folder; wanted a file'
      )
  out = ''
  if _OUT.value:
    out = str(files.local_path('--out', _OUT.value, token_cache.ELSEWHERE))
    files.check_folder('out', out)
  options = data.Options(_EXIF.value, _MAX_PIXELS.value)
  settings = prepare.Settings(_RESIZE.value, _QUALITY.value, options)
  settings.check()
  found = data.open_pictures(
    _PATH.value,
    source=_SOURCE.value,
    label_files=_LABELS.value,
    any_size=True,
  )
  cli.say('\n'.join(found.describe()))
  workers = _NUM_WORKERS.value or cores.count_cores()
  try:
    if _CHECK.value:
      report = prepare.check(
        found, options=options, num_workers=workers, say=cli.say
      )
    else:
      report = prepare.prepare(
        found,
        out,
        settings,
        skip_bad=_SKIP_BAD.value,
        most_bad=_MOST_BAD.value,
        num_workers=workers,
        say=cli.say,
      )
  except prepare.BadPicturesError as error:
    _write(error.report)
    raise
  _write(report)
  counts = ', '.join(
    f'{split["images"]:,} {name}' for name, split in report['splits'].items()
  )
  bad = report['bad']
  cli.say(f'{counts} images can be read, {len(bad):,} cannot')
  for item in bad[:10]:
    # A name may hold the end of a line.
    cli.say(f'  {item["path"]}: {item["reason"]}'.replace('\n', '\\n'))
  if len(bad) > 10:
    cli.say(f'  and {len(bad) - 10:,} more')


def _write(report: dict[str, Any]) -> None:
  """Writes --report, if it was given."""
  if _REPORT.value:
    files.write_json(_REPORT.value, report)


if __name__ == '__main__':
  cli.run(main, FLAGS)
