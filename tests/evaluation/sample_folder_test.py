import io
import json
import types
import zipfile

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import errors, inference
from selfboottok_jax.evaluation import sample_folder

COUNT, CLASSES = 11, ['cat', 'a dog/wolf', 'cow']
LABELS = np.arange(COUNT, dtype=np.int32) % 3
IMAGES = np.random.default_rng(0).integers(
  0, 256, (COUNT, 8, 8, 3), dtype=np.uint8
)


def _open(path, **options):
  settings = options.pop('settings', {'scale': 1.5})
  labels = options.pop('labels', LABELS)
  return sample_folder.SampleFolder(path, settings, labels, **options)


def _fill(folder, *batches):
  folder.begin()
  for batch in batches:
    indices = np.asarray(batch)
    folder.add(indices, IMAGES[indices])


def _arrays(path):
  with np.load(path / 'samples.npz') as arrays:
    return dict(arrays)


def test_images_and_arrays_hold_the_samples(tmp_path):
  folder = _open(tmp_path / 'out', npz=True)
  # In any order, in batches of any size.
  _fill(folder, [7, 3, 9], [0, 1, 2], [4, 5, 6, 8, 10])
  folder.finish(CLASSES)
  arrays = _arrays(folder.path)
  np.testing.assert_array_equal(arrays['arr_0'], IMAGES)
  np.testing.assert_array_equal(arrays['arr_1'], LABELS)
  # Not compressed: evaluators read it as a stream.
  with zipfile.ZipFile(folder.path / 'samples.npz') as archive:
    kinds = {info.compress_type for info in archive.infolist()}
  assert kinds == {zipfile.ZIP_STORED}
  for index in range(COUNT):
    name = f'{index:06d}_class{LABELS[index]:04d}.png'
    with Image.open(folder.path / 'images' / name) as image:
      np.testing.assert_array_equal(np.asarray(image), IMAGES[index])
  assert not (folder.path / 'parts').exists()
  assert folder.is_complete


def test_a_picture_for_each_class(tmp_path):
  folder = _open(tmp_path / 'out')
  _fill(folder, range(COUNT))
  folder.finish(CLASSES)
  assert sorted(p.name for p in (folder.path / 'grids').iterdir()) == [
    'class0000_cat.png',
    'class0001_a_dog_wolf.png',
    'class0002_cow.png',
  ]
  assert (folder.path / 'grid.png').is_file()
  # A row per class, as many columns as the smallest class has samples.
  with Image.open(folder.path / 'grid.png') as image:
    assert image.height == 3 * 96 + 2 * 2
    assert image.width == 3 * 96 + 2 * 2


@pytest.mark.parametrize('npz', [False, True])
def test_what_is_missing_is_known_after_a_stop(tmp_path, npz):
  _fill(_open(tmp_path / 'out', npz=npz), [0, 1, 2], [8, 9])
  # A torn file of a killed process is none.
  kept = 'parts' if npz else 'images'
  (tmp_path / 'out' / kept / '.000003.png.77.partial').write_bytes(b'torn')
  again = _open(tmp_path / 'out', npz=npz)
  np.testing.assert_array_equal(again.missing(), [3, 4, 5, 6, 7, 10])
  with pytest.raises(errors.UserError, match='lacks 6 of 11 samples'):
    again.finish(CLASSES)
  again.add(again.missing(), IMAGES[again.missing()])
  again.finish(CLASSES)
  assert not again.missing().size


def test_a_stop_while_finishing_loses_nothing(tmp_path, monkeypatch):
  folder = _open(tmp_path / 'out', npz=True)
  _fill(folder, range(COUNT))

  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(sample_folder.os, 'replace', stop)
  with pytest.raises(KeyboardInterrupt):
    folder.finish(CLASSES)
  monkeypatch.undo()
  again = _open(tmp_path / 'out', npz=True)
  assert not again.missing().size
  again.finish(CLASSES)
  np.testing.assert_array_equal(_arrays(again.path)['arr_0'], IMAGES)


@pytest.mark.parametrize('npz', [False, True])
def test_a_folder_in_an_object_store(store, bucket, tmp_path, npz):
  local = _open(tmp_path / 'out', npz=npz)
  _fill(local, range(COUNT))
  local.finish(CLASSES)
  _fill(_open(f'{bucket}/a b', npz=npz), [0, 1, 2], [8, 9])
  # What a killed process leaves.
  store.put(f'{bucket}/a b/.{sample_folder.SETTINGS}.41.partial', b'half')
  again = _open(f'{bucket}/a b/', npz=npz)
  assert not again.is_complete
  np.testing.assert_array_equal(again.missing(), [3, 4, 5, 6, 7, 10])
  again.add(again.missing(), IMAGES[again.missing()])
  again.finish(CLASSES)
  assert again.is_complete
  names = [p for p in local.path.rglob('*') if p.is_file()]
  assert store.names(f'{bucket}/a b') == sorted(
    path.relative_to(local.path).as_posix() for path in names
  )
  for path in names:
    name = path.relative_to(local.path).as_posix()
    if path.suffix == '.png':
      assert store.read(f'{bucket}/a b/{name}') == path.read_bytes()
  if npz:
    arrays = np.load(io.BytesIO(store.read(f'{bucket}/a b/samples.npz')))
    np.testing.assert_array_equal(arrays['arr_0'], IMAGES)
    np.testing.assert_array_equal(arrays['arr_1'], LABELS)
  with pytest.raises(errors.UserError, match='scale: 1.5 there, 2.0 given'):
    _open(f'{bucket}/a b', npz=npz, settings={'scale': 2.0})
  store.put(f'{bucket}/other/letter.txt', b'dear')
  with pytest.raises(errors.UserError, match='nothing is overwritten'):
    _open(f'{bucket}/other')


def test_an_object_store_that_is_away_is_told(store):
  store.forbidden.add('away-samples')
  with pytest.raises(errors.UserError, match='away-samples/out.*be reached'):
    _open('gs://away-samples/out')


def test_pictures_that_a_stop_left_undrawn_are_drawn(tmp_path):
  folder = _open(tmp_path / 'out')
  _fill(folder, range(COUNT))
  folder.finish(CLASSES)
  (folder.path / sample_folder.GRID).unlink()
  assert not folder.is_complete
  folder.finish(CLASSES)
  assert folder.is_complete


def test_other_samples_are_refused(tmp_path):
  _fill(_open(tmp_path / 'out'), [0])
  before = sorted(tmp_path.rglob('*'))
  for change, told in (
    ({'settings': {'scale': 2.0}}, 'scale: 1.5 there, 2.0 given'),
    ({'labels': LABELS[:5]}, 'num_samples: 11 there, 5 given'),
    ({'npz': True}, 'npz: False there, True given'),
    ({'png': False, 'npz': True}, 'png: True there, False given'),
  ):
    with pytest.raises(errors.UserError, match=told):
      _open(tmp_path / 'out', **change)
  assert sorted(tmp_path.rglob('*')) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
  (tmp_path / 'letter.txt').write_text('dear')
  with pytest.raises(errors.UserError, match='nothing is overwritten'):
    _open(tmp_path)
  (tmp_path / 'sampling.json').write_text('{"scale"')
  with pytest.raises(errors.UserError, match='sampling.json is damaged'):
    _open(tmp_path)


def test_nothing_to_keep_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='keeps no sample'):
    _open(tmp_path / 'out', png=False, npz=False)


def test_settings_are_on_record(tmp_path):
  folder = _open(tmp_path / 'out', png=False, npz=True)
  _fill(folder, [0])
  record = json.loads((folder.path / 'sampling.json').read_text())
  assert record == {
    'scale': 1.5,
    'num_samples': COUNT,
    'png': False,
    'npz': True,
  }
  assert not (folder.path / 'images').exists()


def test_what_a_loss_of_power_left_empty_is_made_again(tmp_path):
  pictures, arrays = _open(tmp_path / 'png'), _open(tmp_path / 'npz', npz=True)
  for folder in (pictures, arrays):
    _fill(folder, [0, 1], [2, 3])
  (tmp_path / 'png' / 'images' / '000001_class0001.png').write_bytes(b'')
  (first, _) = sorted((tmp_path / 'npz' / 'parts').iterdir())
  first.write_bytes(b'')
  assert 1 in pictures.missing()
  assert {0, 1} <= set(arrays.missing().tolist())
  assert 2 not in arrays.missing()
  arrays.add(arrays.missing(), IMAGES[arrays.missing()])
  arrays.finish(CLASSES)
  np.testing.assert_array_equal(_arrays(arrays.path)['arr_0'], IMAGES)


def test_what_a_stop_left_behind_is_cleared_away(tmp_path):
  folder = _open(tmp_path / 'out', npz=True)
  _fill(folder, range(COUNT))
  folder.finish(CLASSES)
  (folder.path / 'parts').mkdir()
  assert not folder.is_complete
  folder.finish(CLASSES)
  assert folder.is_complete


def test_half_written_files_of_a_killed_run_are_cleared_away(tmp_path):
  folder = _open(tmp_path / 'out', npz=True)
  _fill(folder, [0, 1, 2])
  left = [
    folder.path / f'.{sample_folder.SETTINGS}.41.partial',
    folder.path / 'images' / '.000003_class0000.png.41.partial',
  ]
  for path in left:
    path.write_bytes(b'half')
  assert 3 in folder.missing()
  _fill(folder, range(3, COUNT))
  folder.finish(CLASSES)
  assert not any(path.exists() for path in left)
  assert len(list((folder.path / 'images').iterdir())) == COUNT


def test_a_run_that_was_killed_at_its_start_continues(tmp_path):
  left = tmp_path / 'out' / f'.{sample_folder.SETTINGS}.41.partial'
  left.parent.mkdir()
  left.write_bytes(b'half')
  folder = _open(tmp_path / 'out')
  _fill(folder, range(COUNT))
  folder.finish(CLASSES)
  assert not left.exists()


def test_labels_are_balanced_random_or_given():
  make, names = sample_folder.make_labels, ('cat', 'n01440764', '7')
  np.testing.assert_array_equal(
    make(['balanced'], 5, 0, names), [0, 1, 2, 0, 1]
  )
  np.testing.assert_array_equal(make(['2', '0'], 3, 0, names), [2, 0, 2])
  # By name, also in words; a number is a label where there is such a label.
  np.testing.assert_array_equal(
    make(['Cat', 'tench', 'n01440764', '7'], 4, 0, names), [0, 1, 1, 2]
  )
  long, short = (make(['random'], count, 1, names) for count in (40, 10))
  np.testing.assert_array_equal(long[:10], short)
  assert set(long.tolist()) == {0, 1, 2}
  for wrong in (['3'], ['-1'], ['x'], [''], ['balanced', '1']):
    with pytest.raises(errors.ConfigError, match='is no class; wanted'):
      make(wrong, 5, 0, names)
  with pytest.raises(errors.ConfigError, match='such as cat'):
    make(['cta'], 5, 0, names)
  with pytest.raises(errors.ConfigError, match="'crane' names 2 classes"):
    make(['crane'], 5, 0, ('n02012849', 'n03126707'))


class _Generator(inference.ImageGenerator):
  """Knows its samples, and how many fit its memory."""

  params, step, class_names = {}, 7, CLASSES
  tokenizer = types.SimpleNamespace(params={})
  mesh = types.SimpleNamespace(size=1)

  def __init__(self, fits):
    self.fits, self.device_batch = fits, 4
    self.asked = []

  def fit_device_batch(self, sampling, *, most=256, limit=None):
    self.asked.append((sampling, most))
    return min(self.fits, most)

  def sample_uint8(self, labels, *, indices, **options):
    return IMAGES[indices]


def _sample(generator, out, *sweep, by_memory=True, labels=LABELS):
  sweep = sweep or (inference.Sampling(),)
  return list(
    sample_folder.sample_folders(
      generator, sweep, out, labels, labels_as='given', by_memory=by_memory
    )
  )


def _record(path):
  return json.loads((path / 'sampling.json').read_text())


def test_memory_decides_and_the_record_tells(tmp_path):
  generator = _Generator(fits=8)
  (told,) = _sample(generator, tmp_path / 'auto')
  assert '8 at a time on each device' in told
  assert _record(tmp_path / 'auto')['device_batch'] == 8
  # 11 samples need no more than 16 at a time.
  assert [most for _, most in generator.asked] == [16]
  (told,) = _sample(generator, tmp_path / 'given', by_memory=False)
  assert '4 at a time on each device' in told
  assert _record(tmp_path / 'given')['device_batch'] == 4
  assert len(generator.asked) == 1


def test_a_folder_goes_on_with_the_number_on_its_record(tmp_path):
  out = tmp_path / 'out'
  _sample(_Generator(fits=8), out)
  (out / 'images' / '000003_class0000.png').unlink()
  # Another device, which has more memory.
  other = _Generator(fits=16)
  (told,) = _sample(other, out)
  assert '1 of them now' in told
  assert '8 at a time' in told
  assert not other.asked
  assert _record(out)['device_batch'] == 8
  # A number that is given must be that of the record.
  with pytest.raises(errors.UserError, match='device_batch: 8 there, 4 given'):
    _sample(other, out, by_memory=False)


def test_a_sweep_is_sized_by_its_hungriest_setting(tmp_path):
  plain, guided = (
    inference.Sampling(guidance_scale=scale) for scale in (1.0, 2.0)
  )
  generator = _Generator(fits=2)
  _sample(generator, tmp_path, plain, guided)
  assert [sampling for sampling, _ in generator.asked] == [guided]
  for setting in (plain, guided):
    assert _record(tmp_path / setting.name)['device_batch'] == 2


def test_a_damaged_record_is_told(tmp_path):
  (tmp_path / 'sampling.json').write_text('[1]')
  with pytest.raises(errors.UserError, match='sampling.json is damaged'):
    _sample(_Generator(fits=2), tmp_path)
