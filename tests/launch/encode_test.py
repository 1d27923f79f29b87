import contextlib
import itertools
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import encode_rates, encode_shards, encoder
from launch.builders import common, provenance
from launch.builders import encoding as encoding_builder
from selfboottok_jax import data, errors, inference
from selfboottok_jax.data import (
  latent_files,
  latent_index,
  latent_writer,
  transforms,
)
from tests.launch import commands, pictures, tiny

CONFIG = '--config=tests/launch/tiny.py:generator'


def _arguments(runs, photos, out, *more):
  return [
    CONFIG,
    f'--config.tokenizer={runs / "tokenizer"}',
    '--config.data.source=auto',
    f'--config.data.path={photos}',
    f'--out={out}',
    *more,
  ]


def _encode(server, runs, photos, out, *more):
  result = server.run('encode', *_arguments(runs, photos, out, *more))
  assert result.code == 0, result.err
  return result


def _config(runs, photos, cache=''):
  config = tiny.get_config('generator')
  config.tokenizer = str(runs / 'tokenizer')
  config.data.source, config.data.path = 'auto', str(photos)
  config.data.cache = str(cache)
  return config


def _encoding(runs, config):
  tokenizer = inference.load_tokenizer(runs / 'tokenizer')
  return tokenizer, encoding_builder.build_encoding(
    config, tokenizer.codec, tokenizer.patch_size
  )


@pytest.fixture(scope='module')
def cache(server, runs, photos, tmp_path_factory):
  """Of float32, so that what it holds can be compared closely."""
  out = tmp_path_factory.mktemp('encoded') / 'cache'
  result = _encode(
    server, runs, photos, out, '--shards=3', '--dtype=float32', '--batch_size=2'
  )
  assert 'writing ' in result.out
  assert 'train: 8 images, 3 of 3 shards are new' in result.out
  return out


def _online(config, encoding, split):
  """What a training would compute of centre crops and their mirror images."""
  source = data.open_source('auto', config.data.path, split, 16)
  crops = np.stack(
    [transforms.center_crop(source[i]['image'], 16) for i in range(len(source))]
  )
  sides = np.stack([crops, crops[:, :, ::-1]], 1).reshape(-1, 16, 16, 3)
  made = encoding(encoding.params, jnp.asarray(transforms.to_float(sides)))
  return source, {
    name: np.asarray(leaf).reshape(-1, 2, *leaf.shape[1:])
    for name, leaf in made.items()
  }


@pytest.mark.parametrize('split', ['train', 'val'])
def test_cache_holds_what_a_training_would_compute(split, cache, runs, photos):
  config = _config(runs, photos)
  tokenizer, encoding = _encoding(runs, config)
  images, wanted = _online(config, encoding, split)
  source = data.open_latents(cache, split)
  assert len(source) == len(images) == 8
  assert source.fingerprint == images.fingerprint
  assert source.class_names == ('cat', 'dog')
  assert set(source.names) == set(wanted) == {'codes', 'cls', 'targets'}
  for i in range(8):
    element = source[i]
    assert element['label'] == images[i]['label']
    for name, values in wanted.items():
      np.testing.assert_allclose(element[name], values[i], atol=2e-5)
  np.testing.assert_allclose(
    source.statistics.std, wanted['codes'][:, 0].std(), rtol=1e-4
  )
  source.check(
    tokenizer.fingerprint, config.networks.teacher, 'float32', encoding
  )
  assert source.index.made_by == provenance.made_by(
    config, encoding, tokenizer.fingerprint
  )


def test_training_sees_the_images_in_the_same_order(cache, runs, photos):
  config = _config(runs, photos)
  tokenizer, encoding = _encoding(runs, config)
  batches = []
  for folder in ('', cache):
    config.data.cache = str(folder)
    config.data.path = '' if folder else str(photos)
    source = common.open_data(config, 'train')
    with contextlib.closing(
      common.train_batches(config, source, start_step=3)
    ) as it:
      batches.append(list(itertools.islice(it, 4)))
  for online, cached in zip(*batches, strict=True):
    np.testing.assert_array_equal(cached.pop('label'), online['label'])
    wanted = encoding(encoding.params, jnp.asarray(online['image']))
    assert cached.keys() == wanted.keys()
    for name, value in wanted.items():
      np.testing.assert_allclose(cached[name], value, atol=2e-5)


def test_evaluation_reads_the_cache(cache, runs):
  config = _config(runs, '', cache)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ('data',))
  source = common.open_data(config, 'val')
  batches = list(common.eval_batches(config, source, mesh))
  assert sum(batch['mask'].sum() for batch in batches) == 8
  np.testing.assert_array_equal(batches[0]['codes'][1], source[1]['codes'][0])


def test_fields_that_no_loss_wants_are_not_read(cache, runs):
  config = _config(runs, '', cache)
  config.loss.align = 0.0
  assert common.open_data(config, 'train').names == ('codes', 'cls')
  config.networks.teacher = ''
  source = common.open_data(config, 'train')
  assert source.names == ('codes',)
  _, encoding = _encoding(runs, config)
  assert set(encoding.shapes) == {'codes'}


@pytest.mark.parametrize(
  ('key', 'value'), [('random_crop', True), ('image_size', 32)]
)
def test_what_a_cache_cannot_give_is_refused(key, value, cache, runs):
  config = _config(runs, '', cache)
  config.data[key] = value
  with pytest.raises(errors.ConfigError, match=f'data.{key}={value}'):
    common.open_data(config, 'train')


def test_finished_cache_is_left_as_it_is(cache, server, runs, photos):
  before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
  # The shards are those that are there.
  result = _encode(server, runs, photos, cache, '--dtype=float32')
  assert 'writing' not in result.out
  assert 'val: 8 images, 0 of 3 shards are new' in result.out
  assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == before


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    ((), 'fields.cls.dtype is float32 there, float16 here'),
    (('--dtype=float32', '--shards=2'), 'splits.train.shards is 3 there, 2'),
    (
      ('--dtype=float32', '--config.loss.align_mode=pool'),
      'made_by.align_mode is repeat there, pool here',
    ),
    (('--dtype=float32', '--config.tokenizer=OTHER'), 'made_by.tokenizer is'),
    (('--dtype=float32', '--config.data.path=OTHER'), 'train.fingerprint is'),
  ],
  ids=['dtype', 'shards', 'mode', 'tokenizer', 'data'],
)
def test_other_settings_in_the_folder_are_refused(
  more, message, cache, server, runs, photos, tmp_path
):
  other = tmp_path / 'other'
  if 'tokenizer' in message:
    other = runs / 'softvq'
  elif 'fingerprint' in message:
    shutil.copytree(photos, other)
    pictures.write(other / 'train' / 'cat', 3)
  before = pictures.contents(cache)
  result = server.run(
    'encode',
    *_arguments(runs, photos, cache),
    *(m.replace('OTHER', str(other)) for m in more),
  )
  assert 'holds a cache of other settings' in result.error
  assert message in result.error
  assert pictures.contents(cache) == before


def test_splits_may_come_one_after_the_other(server, runs, photos, tmp_path):
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  _encode(server, runs, photos, whole, '--splits=val,train')
  _encode(server, runs, photos, parts, '--splits=val')
  with pytest.raises(errors.DataError, match='no train split'):
    data.open_latents(parts, 'train')
  _encode(server, runs, photos, parts, '--splits=train')
  assert pictures.contents(parts) == pictures.contents(whole)


# Many shards that take a while together.
SCENES = (
  '--config.data.source=procedural',
  '--config.data.path=',
  '--splits=val',
  '--shards=100',
)


@pytest.fixture(scope='module')
def scenes(server, runs, tmp_path_factory):
  out = tmp_path_factory.mktemp('scenes') / 'cache'
  _encode(server, runs, '', out, *SCENES)
  return out


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_stopped_command_continues_to_the_same_bytes(
  number, scenes, server, runs, tmp_path
):
  out = tmp_path / 'cache'
  # On a busy machine the command may end before the signal reaches it.
  for _ in range(8):
    shutil.rmtree(out, ignore_errors=True)
    arguments = _arguments(runs, '', out, *SCENES)
    with commands.spawn('encode', *arguments) as process:
      while not list(out.glob('*.array_record')) and process.poll() is None:
        time.sleep(0.002)
      process.send_signal(number)
      err = process.stderr.read()
    if process.returncode:
      break
  assert 'Traceback' not in err
  if number == signal.SIGINT:
    assert process.returncode == 130
    assert err.endswith('error: stopped; the same command continues\n')
    assert not list(out.glob('.*'))
  with pytest.raises(errors.DataError, match='incomplete: .* of 100 shards'):
    data.open_latents(out, 'val')
  # What is whole is kept, what only looks like it is not.
  kept = sorted(out.glob('*.array_record'))
  assert 0 < len(kept) < 100
  before = {path: path.stat().st_ino for path in kept}
  pictures.truncate(kept[0])
  _encode(server, runs, '', out, *SCENES)
  assert pictures.contents(out) == pictures.contents(scenes)
  assert all(path.stat().st_ino == before[path] for path in kept[1:])


def test_rates_of_writing_and_of_the_encoder_are_told(
  server, runs, photos, tmp_path
):
  result = _encode(
    server, runs, photos, tmp_path / 'cache', '--measure', '--batch_size=1'
  )
  last = result.out.splitlines()[-1]
  assert last.startswith('written at ')
  assert 'images/s, the encoder alone makes ' in last
  assert last.endswith('%')


def test_nothing_is_decoded_while_the_encoder_is_timed():
  seen = []

  def time_encoder(count):
    reader.start()
    time.sleep(0.2)
    seen.append(len(read))
    return 0.5 * count

  rates = encode_rates.Rates(time_encoder, batch_size=10)
  source, read = rates.gated(data.ProceduralSource('val', 8)), []
  reader = threading.Thread(target=lambda: read.append(source[0]))
  assert [rates.due() for _ in range(2 * encode_rates.EVERY)].count(True) == 2
  rates.take()
  reader.join(10)
  assert seen == [0]
  assert len(read) == 1
  assert len(source) == 2000
  rates.add(30)
  assert 'the encoder alone makes 20.0 images/s' in rates.summary()


def _write_in_process(encoding, tokenizer, config, out, batch_size):
  """All of val in two shards, on the eight devices of this process."""
  source = common.open_data(config, 'val')
  index = latent_index.Index(
    16,
    'float32',
    {name: leaf.shape for name, leaf in encoding.shapes.items()},
    source.class_names,
    provenance.made_by(config, encoding, tokenizer.fingerprint),
    {'val': latent_index.Split(len(source), 2, source.fingerprint)},
  )
  latent_files.write_index(out, index)
  counts = encode_shards.write_shards(
    encoder.Encoder(encoding, 'float32', batch_size),
    source,
    str(out),
    index,
    'val',
    [0, 1],
  )
  return source, list(counts)


def test_devices_share_a_batch(runs, photos, tmp_path):
  config = _config(runs, photos)
  tokenizer, encoding = _encoding(runs, config)
  assert jax.local_device_count() == 8
  _, counts = _write_in_process(encoding, tokenizer, config, tmp_path, 16)
  assert counts == [4, 4]
  _, wanted = _online(config, encoding, 'val')
  index = latent_files.read_index(tmp_path)
  latent_writer.finish(tmp_path, index, 'val')
  source = data.open_latents(tmp_path, 'val')
  for i in range(8):
    for name, values in wanted.items():
      np.testing.assert_allclose(source[i][name], values[i], atol=2e-5)
  with pytest.raises(errors.ConfigError, match='--batch_size=12 does not'):
    encoder.Encoder(encoding, 'float32', 12)


def test_what_fails_in_the_writing_thread_ends_the_command(
  runs, photos, tmp_path
):
  config = _config(runs, photos)
  tokenizer, encoding = _encoding(runs, config)
  broken = {**encoding.params}
  broken['tokenizer'] = jax.tree.map(lambda a: a * np.nan, broken['tokenizer'])

  class Broken(type(encoding)):
    params = broken

  bad = Broken(
    encoding.codec, encoding.teacher, encoding.has_cls, encoding.align_mode
  )
  with pytest.raises(errors.DataError, match='codes of image 0 of val are not'):
    _write_in_process(bad, tokenizer, config, tmp_path, 8)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['cache.json']


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--dtype=int8'], '--dtype=int8; wanted one of float16, float32'),
    (['--shards=0'], '--shards=0 of the 8 images of train; wanted 1'),
    (['--shards=9'], '--shards=9 of the 8 images of train'),
    (['--splits=test'], "unknown split 'test'"),
    (['--splits='], '--splits is empty'),
    (['--batch_size=0'], '--batch_size=0'),
    (['--config.data.cache=CACHE'], 'is what trainings read'),
    (['--config.data.path=/nowhere'], '/nowhere does not exist'),
    (['--config.data.path=FLAT', '--splits=train'], 'no class folders'),
    (['--config.data.image_size=32'], 'is of 16'),
    (['--config.tokenizer='], 'tokenizer is empty'),
    (['--config.tokenizer=/nowhere'], '/nowhere is no run'),
    (['--out=FLAT'], 'is not empty and holds no cache.json'),
    (['--measure', '--config.data.num_workers=1'], '--measure cannot hold'),
    (['--config=tests/launch/tiny.py:tokenizer'], 'is of task tokenizer'),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_bad_input_is_one_line_and_leaves_nothing(
  more, message, server, runs, photos, tmp_path
):
  flat, out = tmp_path / 'flat', tmp_path / 'cache'
  pictures.write(flat, 12)
  arguments = _arguments(runs, photos, out)
  if 'task' in message:
    arguments = [f'--out={out}']
  result = server.run(
    'encode',
    *arguments,
    *(m.replace('FLAT', str(flat)).replace('CACHE', str(out)) for m in more),
  )
  assert message in result.error
  assert not out.exists()


def test_damaged_images_are_told(server, runs, photos, tmp_path):
  damaged = shutil.copytree(photos, tmp_path / 'photos')
  pictures.truncate(damaged / 'train' / 'dog' / '2.jpg')
  result = server.run('encode', *_arguments(runs, damaged, tmp_path / 'cache'))
  assert 'train/dog/2.jpg is no image that can be read' in result.error
  assert not list((tmp_path / 'cache').glob('.*'))


@pytest.mark.slow
def test_processes_share_the_shards(scenes, runs, tmp_path):
  out = tmp_path / 'cache'
  first, second = commands.run_together(
    'encode', *_arguments(runs, '', out, *SCENES)
  )
  assert '100 of 100 shards are new' in first.out
  assert 'shards' not in second.out
  assert pictures.contents(out) == pictures.contents(scenes)
