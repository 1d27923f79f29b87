"""The same pictures give the same training, whatever they are kept in."""

import concurrent.futures
import pickle

import numpy as np
import pytest

from selfboottok_jax.data import (
  parquet,
  picture_set,
  shards,
  sources,
  tfds,
)
from tests.data import forms, takes

FORMS = {
  'shards': (forms.write_shards, shards.open_shards),
  'parquet': (forms.write_hub, parquet.open_parquet),
  'tfds': (
    lambda root: f'tfds:{forms.write_tfds(root)}',
    tfds.open_tfds,
  ),
}


@pytest.fixture(name='found', scope='module', params=FORMS)
def _found(request, tmp_path_factory):
  root = tmp_path_factory.mktemp(request.param)
  write, open_set = FORMS[request.param]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(root / 'cache'))
    return open_set(write(root / 'set'))


@pytest.mark.parametrize('split', picture_set.SPLITS)
def test_lists_every_picture_in_the_order_written(found, split):
  wanted = forms.of_split(split)
  listed = found.splits[split]
  assert found.class_names == forms.NAMES
  assert listed.labels.tolist() == [p.label for p in wanted]
  assert listed.sizes.tolist() == [len(p.data) for p in wanted]
  assert [listed.read(i) for i in range(len(listed))] == [
    p.data for p in wanted
  ]
  assert len(set(listed.names)) == len(wanted)


def test_a_copy_in_another_process_reads_the_same(found):
  split = found.splits['train']
  copy = pickle.loads(pickle.dumps(split))
  assert [copy.read(i) for i in (44, 0, 17)] == [
    split.read(i) for i in (44, 0, 17)
  ]
  assert copy.fingerprint == split.fingerprint


def test_no_pictures_are_sent_along(found):
  total = int(found.splits['train'].sizes.sum())
  assert len(pickle.dumps(found.splits['train'])) < total / 2


@pytest.fixture(name='wanted', scope='module')
def _wanted(tmp_path_factory):
  """Batches of the same pictures in a folder."""
  root = tmp_path_factory.mktemp('folder') / 'set'
  source = sources.open_source('auto', forms.write_folder(root), 'train', 32)
  return takes.take(source, 12, num_workers=0, num_threads=0)


@pytest.mark.parametrize(
  'workers', [0, pytest.param(2, marks=pytest.mark.slow)]
)
def test_training_batches_are_those_of_a_folder(found, wanted, workers):
  source = picture_set.PictureSource(found, 'train')
  given = takes.take(source, 12, num_workers=workers, num_threads=1)
  for theirs, ours in zip(wanted, given, strict=True):
    np.testing.assert_array_equal(theirs['image'], ours['image'])
    np.testing.assert_array_equal(theirs['label'], ours['label'])


def test_threads_read_at_a_time(found):
  split = found.splits['train']
  wanted = [p.data for p in forms.of_split('train')] * 20
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    copy = pickle.loads(pickle.dumps(split))
    indices = [i for _ in range(20) for i in range(len(split))]
    assert list(pool.map(copy.read, indices)) == wanted
