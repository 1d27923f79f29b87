"""Bad input ends a command with one line that helps, and changes nothing."""

import pytest

from tests.launch import pictures


@pytest.fixture(scope='session')
def bad(runs, tmp_path_factory):
  """A folder of everything that is not as it should be."""
  folder = tmp_path_factory.mktemp('bad')
  (folder / 'empty').mkdir()
  (folder / 'file').write_text('neither folder nor tar')
  (folder / 'no_checkpoint').mkdir()
  config = (runs / 'tokenizer' / 'config.json').read_text()
  (folder / 'no_checkpoint' / 'config.json').write_text(config)
  for name in ('no_image', 'cut_short', 'no_image_val', 'no_val'):
    for split in ('train', 'val'):
      pictures.write(folder / name / split, 4)
  for file in (folder / 'no_val' / 'val').iterdir():
    file.unlink()
  (folder / 'no_image' / 'train' / 'x.jpg').write_text('hello')
  (folder / 'no_image_val' / 'val' / 'x.jpg').write_text('hello')
  pictures.truncate(folder / 'cut_short' / 'train' / '0.jpg')
  return folder


@pytest.fixture
def refused(server, runs, bad, tmp_path):
  """Checks {name: (command, what its one line must say, its environment)}."""

  def check(cases):
    before = {folder: pictures.contents(folder) for folder in (runs, bad)}
    places = {'runs': runs, 'bad': bad, 'new': tmp_path / 'new'}
    wrong = {}
    for name, (command, wanted, *variables) in cases.items():
      words = (word.format(**places) for word in command)
      result = server.run(*words, **dict(*variables))
      missing = [
        text
        for text in (word.format(**places) for word in wanted)
        if text not in result.error
      ]
      if missing or result.out or result.err != f'{result.error}\n':
        wrong[name] = (missing, result)
      if (tmp_path / 'new').exists():
        wrong[name] = ('written', list((tmp_path / 'new').iterdir()))
    assert not wrong
    for folder, contents in before.items():
      assert pictures.contents(folder) == contents

  return check
