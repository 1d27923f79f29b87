import contextlib
import dataclasses
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import data, errors, pixels
from selfboottok_jax.data import token_cache, token_cache_writer
from selfboottok_jax.stages import frozen_encoders, inputs
from tests.launch import encodes, pictures


@pytest.fixture(scope='module')
def cache(server, runs, photos, tmp_path_factory):
  """A cache in float32, so that its values can be compared closely."""
  out = tmp_path_factory.mktemp('encoded') / 'cache'
  result = encodes.encode(
    server, runs, photos, out, '--shards=3', '--dtype=float32', '--batch_size=2'
  )
  assert 'writing ' in result.out
  assert 'train: 8 images, 3 of 3 shards are new' in result.out
  return out


@pytest.mark.parametrize('split', ['train', 'val'])
def test_cache_holds_what_a_training_would_compute(split, cache, runs, photos):
  config = encodes.config(runs, photos)
  tokenizer, encoding = encodes.encoding(runs, config)
  images, wanted = encodes.online(config, encoding, split)
  source = data.open_token_cache(cache, split)
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
    tokenizer.fingerprint,
    config.networks.teacher,
    'float32',
    encoding.shapes,
    encoding.align_mode,
  )
  assert source.index.made_by == frozen_encoders.made_by(
    config, encoding, tokenizer.fingerprint
  )


def test_training_sees_the_images_in_the_same_order(cache, runs, photos):
  config = encodes.config(runs, photos)
  tokenizer, encoding = encodes.encoding(runs, config)
  batches = []
  for folder in ('', cache):
    config.data.cache = str(folder)
    config.data.path = '' if folder else str(photos)
    source = inputs.open_data(config, 'train')
    with contextlib.closing(
      inputs.train_batches(config, source, start_step=3)
    ) as it:
      batches.append(list(itertools.islice(it, 4)))
  for online, cached in zip(*batches, strict=True):
    np.testing.assert_array_equal(cached.pop('label'), online['label'])
    wanted = encoding(
      encoding.params, pixels.to_float(jnp.asarray(online['image']))
    )
    assert cached.keys() == wanted.keys()
    for name, value in wanted.items():
      np.testing.assert_allclose(cached[name], value, atol=2e-5)


def test_evaluation_reads_the_cache(cache, runs):
  config = encodes.config(runs, '', cache)
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]), ('data',))
  source = inputs.open_data(config, 'val')
  batches = list(inputs.eval_batches(config, source, mesh))
  assert sum(batch['mask'].sum() for batch in batches) == 8
  np.testing.assert_array_equal(batches[0]['codes'][1], source[1]['codes'][0])


def test_fields_that_no_loss_wants_are_not_read(cache, runs):
  config = encodes.config(runs, '', cache)
  config.loss.align = 0.0
  assert inputs.open_data(config, 'train').names == ('codes', 'cls')
  config.networks.teacher = ''
  source = inputs.open_data(config, 'train')
  assert source.names == ('codes',)
  _, encoding = encodes.encoding(runs, config)
  assert set(encoding.shapes) == {'codes'}


@pytest.mark.parametrize(
  ('key', 'value'), [('random_crop', True), ('image_size', 32)]
)
def test_what_a_cache_cannot_give_is_refused(key, value, cache, runs):
  config = encodes.config(runs, '', cache)
  config.data[key] = value
  with pytest.raises(errors.ConfigError, match=f'data.{key}={value}'):
    inputs.open_data(config, 'train')


def test_a_new_cache_has_a_record_for_each_side(cache):
  index = token_cache.read_index(cache)
  assert index.apart
  assert json.loads((cache / 'cache.json').read_text())['version'] == 2


def test_an_older_cache_goes_on_as_it_was_begun(
  cache, server, runs, photos, tmp_path
):
  old = tmp_path / 'cache'
  index = token_cache.read_index(cache)
  train = dataclasses.replace(
    index, apart=False, splits={'train': index.splits['train']}
  )
  token_cache.write_index(old, train)
  source = data.open_token_cache(cache, 'train')
  for shard in range(2):
    writer = token_cache_writer.ShardWriter(old, train, 'train', shard)
    for image in range(*train.splits['train'].bounds(shard)):
      element = source[image]
      labels = np.array([element.pop('label')], np.int32)
      writer.write({k: v[None] for k, v in element.items()}, labels)
    writer.close()
  result = encodes.encode(server, runs, photos, old, '--dtype=float32')
  assert 'train: 8 images, 1 of 3 shards are new' in result.out
  assert not token_cache.read_index(old).apart
  for split in ('train', 'val'):
    one, other = (data.open_token_cache(f, split) for f in (cache, old))
    for i in range(8):
      for name, values in one[i].items():
        np.testing.assert_allclose(other[i][name], values, atol=2e-5)


def test_finished_cache_is_left_as_it_is(cache, server, runs, photos):
  before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
  # The shards are those that are there.
  result = encodes.encode(server, runs, photos, cache, '--dtype=float32')
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
    *encodes.arguments(runs, photos, cache),
    *(m.replace('OTHER', str(other)) for m in more),
  )
  assert 'holds a cache of other settings' in result.error
  assert message in result.error
  assert pictures.contents(cache) == before


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
    (['--config.data.bad=skip'], 'a cache has a record of every image'),
    (['--config.data.image_size=32'], 'is of 16'),
    (['--config.tokenizer='], 'tokenizer is empty'),
    (['--config.tokenizer=/nowhere'], '/nowhere is no run'),
    (['--out=FLAT'], 'is not empty and holds no cache.json'),
    (['--config=tests/launch/tiny.py:tokenizer'], 'is of task tokenizer'),
  ],
  ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_bad_input_is_one_line_and_leaves_nothing(
  more, message, server, runs, photos, tmp_path
):
  flat, out = tmp_path / 'flat', tmp_path / 'cache'
  pictures.write(flat, 12)
  arguments = encodes.arguments(runs, photos, out)
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
  result = server.run(
    'encode', *encodes.arguments(runs, damaged, tmp_path / 'cache')
  )
  assert 'train/dog/2.jpg is no image that can be read' in result.error
  assert not list((tmp_path / 'cache').glob('.*'))
