import numpy as np
from PIL import Image


def _sample(server, runs, out, *arguments):
  result = server.run(
    'sample',
    f'--workdir={runs / "generator"}',
    f'--tokenizer={runs / "scaled"}',
    f'--out={out}',
    *arguments,
  )
  assert result.code == 0, result.err
  return result


def _pixels(file):
  with Image.open(file) as image:
    return np.asarray(image)


def test_writes_numbered_images_and_a_grid(server, runs, tmp_path):
  out = tmp_path / 'deep' / 'samples'
  result = _sample(
    server, runs, out, '--num_samples=5', '--batch_size=2', '--labels=7,3'
  )
  assert sorted(file.name for file in out.iterdir()) == [
    '000000_class0007.png',
    '000001_class0003.png',
    '000002_class0007.png',
    '000003_class0003.png',
    '000004_class0007.png',
    'grid.png',
  ]
  assert f'5 images and grid.png in {out}' in result.out
  images = [_pixels(file) for file in sorted(out.glob('0*.png'))]
  assert all(image.shape == (16, 16, 3) for image in images)
  assert not np.array_equal(images[0], images[2])


def test_sample_depends_on_its_index_not_on_the_batch(server, runs, tmp_path):
  for name, size in (('one', 4), ('two', 2)):
    _sample(
      server, runs, tmp_path / name, '--num_samples=4', f'--batch_size={size}'
    )
  names = [file.name for file in (tmp_path / 'one').glob('0*.png')]
  assert len(names) == 4
  for name in names:
    one, two = (_pixels(tmp_path / folder / name) for folder in ('one', 'two'))
    # Rounding to 8 bits may tip over on the last bit of a float.
    assert np.abs(one.astype(int) - two.astype(int)).max() <= 1


def test_empty_folder_and_other_sampler_are_taken(server, runs, tmp_path):
  _sample(
    server,
    runs,
    tmp_path,
    '--num_samples=2',
    '--sampler=heun',
    '--num_steps=2',
    '--guidance_scale=1',
    '--guidance_low=0.2',
    '--guidance_high=0.2',
  )
  assert len(list(tmp_path.iterdir())) == 3
