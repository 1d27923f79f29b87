import json
import shutil

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.evaluation import ablation, evaluate, report, scores
from selfboottok_jax.stages import page
from tests.evaluation import page as page_lib


@pytest.mark.parametrize(
  ('folders', 'names'),
  [
    (['runs/tok', 'runs/gen'], ['tok', 'gen']),
    (['a/tok/', 'b/tok', 'b/gen'], ['a/tok', 'b/tok', 'gen']),
    (['x/a/tok', 'x/b/tok', 'y/b/tok'], ['a/tok', 'x/b/tok', 'y/b/tok']),
    (['gs://bucket/tok', 'gs://other/tok'], ['bucket/tok', 'other/tok']),
    (['runs/tok', 'runs/../runs/tok'], ['tok']),
  ],
)
def test_names_are_the_shortest_that_tell_folders_apart(folders, names):
  found = page.short_names(folders)
  assert list(found) == names
  assert list(found.values()) == folders[: len(names)]


def test_reconstructions_of_several_sizes_are_of_the_same_scenes(runs):
  """Both trainings are of built-in scenes, so no photograph is needed."""
  made = page.make_page(
    {'base': str(runs / 'softvq'), 'stage 1': str(runs / 'tokenizer')}
  )
  (comparison,) = made.comparisons
  assert [row.label for row in comparison.rows] == [
    'Originals', 'base', 'stage 1',
  ]  # fmt: skip
  assert comparison.rows[0].images.shape[0] == page.SHOWN
  again = page.make_page({'only': str(runs / 'tokenizer')}).comparisons[0]
  np.testing.assert_array_equal(again.rows[0].images, comparison.rows[0].images)
  np.testing.assert_array_equal(again.rows[1].images, comparison.rows[2].images)
  assert not made.notes


def _elsewhere(run, workdir, **changes):
  """A copy of a run that seems to be of photographs that were moved since."""
  shutil.copytree(run, workdir)
  path = workdir / 'config.json'
  config = json.loads(path.read_text()) | changes
  config['data'] |= {'source': 'auto', 'path': f'{workdir}/moved'}
  path.write_text(json.dumps(config))
  return str(workdir)


def _photographs(folder):
  folder.mkdir()
  for index in range(12):
    pixels = np.full((40, 40, 3), 20 * index, np.uint8)
    Image.fromarray(pixels).save(folder / f'{index}.png')
  return folder


def test_pictures_that_are_not_at_hand_leave_a_note(runs, tmp_path):
  moved = _elsewhere(runs / 'tokenizer', tmp_path / 'run')
  made = page.make_page({'moved': moved})
  assert not made.comparisons
  (note,) = made.notes
  assert 'No reconstructions' in note
  assert f'{moved}/moved' in note
  assert '--pictures' in note
  photographs = _photographs(tmp_path / 'photographs')
  named = page.make_page({'moved': moved}, pictures=str(photographs))
  assert not named.notes
  assert str(photographs) in named.comparisons[0].protocol
  with pytest.raises(errors.DataError, match='lost'):
    page.make_page({'moved': moved}, pictures=f'{tmp_path}/lost')


def test_a_generator_alone_has_a_page_without_samples(runs):
  made = page.make_page({'gen': str(runs / 'generator')})
  assert not made.samples
  assert made.notes == [
    'No samples of gen: neither --tokenizer nor a run among --runs decodes for '
    'it.'
  ]
  assert 'id="curves"' in report.render(made)


def test_a_generator_is_not_sampled_with_a_tokenizer_of_other_codes(
  runs, tmp_path
):
  other = _elsewhere(runs / 'softvq', tmp_path / 'other')
  generator = _elsewhere(
    runs / 'generator', tmp_path / 'generator', tokenizer=other
  )
  workdirs = {'gen': generator, 'other': other}
  made = page.make_page(workdirs)
  assert not made.samples
  assert made.decoders == {'gen': 'other'}
  assert [note for note in made.notes if note.startswith('No samples of gen: ')]
  assert not page.make_page(workdirs, per_class=0).notes[1:]
  with pytest.raises(errors.UserError, match='other'):
    page.make_page(workdirs, tokenizer=other)


def test_scores_have_the_pages_names_and_stages_are_compared(runs, tmp_path):
  base = str(tmp_path / 'tokenizer')
  workdirs = {
    'scaled': _elsewhere(runs / 'scaled', tmp_path / 'scaled', tokenizer=base),
    'tokenizer': _elsewhere(runs / 'tokenizer', tmp_path / 'tokenizer'),
  }
  for name, psnr in (('tokenizer', 20.0), ('scaled', 19.0)):
    score = scores.Score('at that time', 'psnr', psnr, {'count': 3})
    evaluate.add_scores(workdirs[name], [score])
  made = page.make_page(workdirs)
  assert {(s.run, s.value) for s in made.scores} == {
    ('tokenizer', 20.0), ('scaled', 19.0),
  }  # fmt: skip
  assert made.stages == [('tokenizer', 20.0), ('scaled', 19.0)]
  # Without its stage 1 on the page it continues nothing.
  assert not page.make_page({'scaled': workdirs['scaled']}).stages


def test_a_training_that_has_just_begun_has_a_page(runs, tmp_path):
  shutil.copytree(
    runs / 'tokenizer',
    tmp_path / 'tok',
    ignore=lambda *_: ['checkpoints', 'scores.json'],
  )
  made = page.make_page({'tok': str(tmp_path / 'tok')})
  assert made.notes == ['tok has no checkpoint yet, and no reconstructions.']
  assert made.runs[0].steps == 0


def test_an_ablation_is_shown_as_its_tables(tmp_path):
  value = ablation.Value(
    *('table3', 'softvq', 'SoftVQ', 0, 'rfid', 'reconstructions', 3.25),
    {'count': 10},
  )
  ablation.write(tmp_path, 'title', [], [], [value], {})
  made = page.make_page({'abl': str(tmp_path)})
  assert not made.runs
  ((name, (filled,)),) = made.ablations
  assert name == 'abl'
  assert len(filled.grids[0].body) == 5
  read = page_lib.Page(report.render(made))
  rows = [[' '.join(cell.split()) for cell in row] for row in read.rows]
  (row,) = (row for row in rows if '3.25paper 0.88' in row)
  assert row[0].startswith('SoftVQ')
  assert 'rfid ↓ of reconstructions' in rows[0]
  text = report.write_report(made, tmp_path / 'out').with_suffix('.md')
  assert ' 3.25 (paper: 0.88) |' in text.read_text()
