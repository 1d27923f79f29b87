"""A folder of samples that is filled piece by piece, and survives a stop.

  sampling.json       what the samples are of; other ones are refused
  images/             000000_class0007.png, one a sample
  samples.npz         arr_0 (uint8 [n, h, w, 3]) and arr_1 (labels), as ADM's
                      evaluator reads them
  grids/              a picture for each class
  parts/              what samples.npz is made of, until all of them are there

A sample is known by its index, so a folder may be continued with other batches
and by other numbers of processes.
"""

import concurrent.futures
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from selfboottok_jax import errors, files
from selfboottok_jax.evaluation import pictures

SETTINGS = 'sampling.json'
ARRAYS = 'samples.npz'
_IMAGE = re.compile(r'(\d+)_class\d+\.png')
# What reading a damaged part raises.
_DAMAGED = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)
_PER_CLASS = 16  # Samples in the picture of a class.
_COLUMNS = 4
_WRITERS = 4


class SampleFolder:
  """Samples on disk, by index."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    settings: Mapping[str, Any],
    labels: Int[np.ndarray, ' n'],
    *,
    png: bool = True,
    npz: bool = False,
  ):
    """Opens a folder for samples of `labels`; nothing is written yet.

    Args:
      path: the folder; it need not exist.
      settings: what the samples depend on, as JSON can say it.
      labels: of all samples, by index.
      png: whether to keep an image file of each.
      npz: whether to end with all of them in one file.

    Raises:
      UserError: the folder holds something else, or nothing is to be kept.
    """
    if not (png or npz):
      raise errors.UserError(
        '--nopng without --npz keeps no sample; wanted one of them'
      )
    self.path, self.labels = pathlib.Path(path), labels
    self._png, self._npz = png, npz
    self._settings = json.loads(
      json.dumps(
        {**settings, 'num_samples': len(labels), 'png': png, 'npz': npz}
      )
    )
    self._check()

  @property
  def identity(self) -> str:
    """What tells these samples from others: their settings and labels."""
    return json.dumps([self._settings, self.labels.tolist()], sort_keys=True)

  @property
  def is_complete(self) -> bool:
    """Whether `finish` has nothing to do."""
    is_drawn = (self.path / 'grids').is_dir()
    is_tidy = not (self.path / 'parts').exists()
    return is_drawn and is_tidy and not self.missing().size

  def begin(self) -> None:
    """Makes the folder."""
    text = json.dumps(self._settings, indent=2) + '\n'
    with self._writing():
      files.write_atomically(self.path / SETTINGS, text.encode())

  def missing(self) -> Int[np.ndarray, ' m']:
    """Indices of samples that are not here yet, ascending."""
    here = np.zeros(len(self.labels), bool)
    if not self._npz:
      here[self._indices_of_images()] = True
    elif (self.path / ARRAYS).exists():
      here[:] = True
    else:
      for indices, _ in self._parts():
        here[indices] = True
    return np.flatnonzero(~here)

  def add(
    self,
    indices: Int[np.ndarray, ' b'],
    images: UInt8[np.ndarray, 'b h w 3'],
  ) -> None:
    """Keeps a batch; what was kept is whole whenever it is there."""
    with self._writing():
      if self._png:
        with concurrent.futures.ThreadPoolExecutor(_WRITERS) as pool:
          list(pool.map(self._save_image, indices, images))
      if self._npz:
        buffer = io.BytesIO()
        np.savez(buffer, indices=indices, images=images)
        name = f'{indices[0]:08d}-{indices[-1]:08d}-{len(indices)}.npz'
        files.write_atomically(
          self.path / 'parts' / name, buffer.getvalue(), durable=True
        )

  def finish(self, class_names: Sequence[str]) -> None:
    """Draws the grids and, where it is wanted, writes samples.npz.

    Raises:
      UserError: samples are missing.
    """
    missing = self.missing()
    if missing.size:
      raise errors.UserError(
        f'{self.path} lacks {missing.size} of {len(self.labels)} samples, the '
        f'first of them {missing[0]}; give the same command again, with one '
        'folder that all processes see'
      )
    with self._writing():
      # Every sample is here: no process of this command is writing any.
      for folder in (self.path, self.path / 'images'):
        files.remove_partials(folder)
      self._draw_grids(class_names)
      if self._npz and not (self.path / ARRAYS).exists():
        self._write_arrays()
      # Only now is nothing of them needed again.
      shutil.rmtree(self.path / 'parts', ignore_errors=True)

  def _check(self) -> None:
    """Raises UserError for a folder of other samples, or of something else."""
    record = self.path / SETTINGS
    if not record.exists():
      if not files.is_vacant(self.path):
        raise errors.UserError(
          f'--out={self.path} is not empty and holds no samples; choose a new '
          'folder, nothing is overwritten'
        )
      return
    try:
      there = dict(json.loads(record.read_text()))
    except (ValueError, TypeError) as error:
      raise errors.UserError(
        f'{record} is damaged ({error}); choose another folder'
      ) from error
    names = sorted(there.keys() | self._settings.keys())
    differing = [
      f'{name}: {there.get(name)!r} there, {self._settings.get(name)!r} given'
      for name in names
      if there.get(name) != self._settings.get(name)
    ]
    if differing:
      raise errors.UserError(
        f'--out={self.path} holds other samples ({", ".join(differing[:4])}); '
        'choose another folder, or the same values'
      )

  def _image_path(self, index: int) -> pathlib.Path:
    name = f'{index:06d}_class{self.labels[index]:04d}.png'
    return self.path / 'images' / name

  def _save_image(self, index, image) -> None:
    # Fast: fifty thousand of them are written.
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'PNG', compress_level=1)
    files.write_atomically(self._image_path(int(index)), buffer.getvalue())

  def _indices_of_images(self) -> list[int]:
    folder = self.path / 'images'
    if not folder.is_dir():
      return []
    # A machine that lost its power may have left names without contents.
    names = [e.name for e in os.scandir(folder) if e.stat().st_size]
    found = [match for name in names if (match := _IMAGE.fullmatch(name))]
    return [int(m[1]) for m in found if int(m[1]) < len(self.labels)]

  def _parts(self) -> Iterator[tuple[Int[np.ndarray, ' b'], pathlib.Path]]:
    """Indices and path of each part."""
    for path in sorted((self.path / 'parts').glob('[0-9]*.npz')):
      try:
        with np.load(path) as arrays:
          indices = arrays['indices']
      except _DAMAGED:
        continue  # as if it were not there
      yield indices, path

  def _in_order(
    self, wanted: Int[np.ndarray, ' m']
  ) -> Iterator[UInt8[np.ndarray, 'h w 3']]:
    """Samples by ascending index, a part in memory at a time."""
    if not self._npz:
      for index in wanted:
        with Image.open(self._image_path(int(index))) as image:
          yield np.asarray(image)
      return
    if (self.path / ARRAYS).exists():
      with np.load(self.path / ARRAYS) as arrays:
        yield from arrays['arr_0'][wanted]
      return
    place = {
      int(index): (path, row)
      for indices, path in self._parts()
      for row, index in enumerate(indices)
    }
    opened, images = None, None
    for index in wanted:
      path, row = place[int(index)]
      if path != opened:
        with np.load(path) as arrays:
          opened, images = path, arrays['images']
      yield images[row]

  def _draw_grids(self, class_names: Sequence[str]) -> None:
    """Of each class that there is, its first samples."""
    chosen = {
      label: np.flatnonzero(self.labels == label)[:_PER_CLASS]
      for label in np.unique(self.labels).tolist()
    }
    wanted = np.unique(np.concatenate(list(chosen.values())))
    images = dict(zip(wanted.tolist(), self._in_order(wanted), strict=True))
    rows = []
    # Beside the folder until all are there: its presence tells the end.
    partial = self.path / '.grids'
    for label, indices in chosen.items():
      of_class = np.stack([images[index] for index in indices.tolist()])
      shown = pictures.enlarge(of_class)
      name = _file_name(class_names[label])
      pictures.save_png(
        partial / f'class{label:04d}_{name}.png',
        pictures.grid(shown, min(len(shown), _COLUMNS)),
      )
      rows.append(shown)
    # A row for each of the first classes.
    columns = min(8, min(len(row) for row in rows))
    first = np.concatenate([row[:columns] for row in rows[:10]])
    pictures.save_png(self.path / 'grid.png', pictures.grid(first, columns))
    if not (self.path / 'grids').is_dir():
      partial.rename(self.path / 'grids')
    shutil.rmtree(partial, ignore_errors=True)

  def _write_arrays(self) -> None:
    """Streams all parts into one file that numpy reads."""
    partial = self.path / f'.{ARRAYS}.partial'
    count = len(self.labels)
    samples = self._in_order(np.arange(count))
    first = next(samples)
    with zipfile.ZipFile(partial, 'w', zipfile.ZIP_STORED) as archive:
      # Forced: the size is not known before it is written.
      with archive.open('arr_0.npy', 'w', force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(
          file,
          {
            'descr': np.lib.format.dtype_to_descr(first.dtype),
            'fortran_order': False,
            'shape': (count, *first.shape),
          },
        )
        file.write(first.tobytes())
        for image in samples:
          file.write(image.tobytes())
      with archive.open('arr_1.npy', 'w') as file:
        np.save(file, self.labels.astype(np.int64))
    os.replace(partial, self.path / ARRAYS)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise errors.UserError(
        f'{self.path} cannot be written or read ({error}); make room and give '
        'the same command again'
      ) from error


def _file_name(name: str) -> str:
  """A class name without what file systems dislike."""
  return re.sub(r'[^\w.-]+', '_', name)[:60]
