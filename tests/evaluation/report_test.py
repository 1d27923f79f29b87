import base64
import dataclasses
import io
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.evaluation import (
  cost,
  curves,
  flops,
  pictures,
  report,
  scores,
)
from tests.evaluation import page as page_lib

_HOSTILE = '<script>alert("x")</script> & <b>'


def _images(count, seed=0):
  random = np.random.default_rng(seed)
  return random.integers(0, 256, (count, 8, 8, 3), np.uint8)


def _run(folder, name, psnr, baseline=10.0):
  path = folder / f'{len(list(folder.iterdir()))}.jsonl'
  lines = [{'step': s, 'loss': 1 / s, 'images_per_second': 9} for s in (1, 2)]
  lines += [{'step': 2, 'val/psnr': psnr, 'val/psnr_mean_image': baseline}]
  path.write_text('\n'.join(map(json.dumps, lines)) + '\n{"step": 3, "lo')
  return report.Run(name, f'runs/{name}', 'tokenizer', 1600, 185.0, path)


def _card(memory=None, **components):
  step = flops.Flops(forward=2e9, backward=4e9, recompute=1e9)
  return cost.Card(
    [cost.Row(n, size, kind, step) for n, (size, kind) in components.items()],
    memory=memory,
    compile_seconds=memory and 75.0,
    devices='8 x cpu',
  )


def _report(folder, psnrs=(19.0, 20.5, 21.25), baseline=10.0):
  names = ['SoftVQ baseline', f'Stage 1 {_HOSTILE}', 'Scaled aligner']
  return report.Report(
    title=f'Shapes {_HOSTILE}',
    created='1 May 2026',
    environment={'jax': '0.10.2', 'device': _HOSTILE, 'cores': 2},
    configs={names[0]: {'model': {'width': 192, 'codebook': {'size': 77}}}},
    runs=[
      _run(folder, name, psnr, baseline)
      for name, psnr in zip(names, psnrs, strict=True)
    ],
    comparison=report.Comparison(
      [
        report.Reconstruction('Originals', _images(5)),
        *(
          report.Reconstruction(name, _images(5, i), psnr)
          for i, (name, psnr) in enumerate(zip(names, psnrs, strict=True))
        ),
      ],
      f'first five of 1,000 images {_HOSTILE}',
    ),
    samples=report.Samples(
      {'ring': _images(4), f'cross {_HOSTILE}': _images(4, 1)}, 'Heun, 25 steps'
    ),
    scores=[
      scores.Score(names[0], 'psnr', 19.0, {'count': 1000, 'step': 7}),
      scores.Score(names[1], 'fd_hog', 45.678, {'reference': _HOSTILE}),
      scores.Score(names[1], 'usage', 0.5, {'step': 1600}),
    ],
    costs={
      names[0]: _card(encoder=(1000, True), decoder=(234, True)),
      names[2]: _card(
        encoder=(1000, False),
        aligner=(5678, True),
        losses=(0, None),
        memory=cost.Memory(2**30, 0, 2**20, 2**30),
      ),
    },
    notes=[f'A note {_HOSTILE}'],
  )


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp('metrics')
  made = _report(folder)
  out = tmp_path_factory.mktemp('report') / 'new'
  path = report.write_report(made, out)
  return made, path, page_lib.Page(path.read_text('utf-8'))


def test_page_is_self_contained(written):
  made, path, page = written
  assert path.name == 'report.html'
  assert sorted(p.name for p in path.parent.iterdir()) == [
    'comparison.png', 'report.html', 'samples.png',
  ]  # fmt: skip
  assert not {'script', 'iframe', 'object', 'base'} & {t for t, _ in page.tags}
  ids = {attrs['id'] for _, attrs in page.tags if 'id' in attrs}
  for tag, attrs in page.tags:
    for name in ('src', 'href', 'srcset', 'poster', 'data'):
      link = attrs.get(name)
      if link is None:
        continue
      inside = tag == 'a' and link[0] == '#' and link[1:] in ids
      assert inside or link.startswith('data:'), (tag, link)
  styles = ''.join(text for (at, _), text in page.texts if at == 'style')
  assert len(styles) > 1000
  assert not re.search(r'url\(|@import|https?:', styles)


def test_pictures_of_the_page_decode(written):
  made, _, page = written
  kinds = {'png': 0, 'svg+xml': 0}
  for image in page.images:
    assert image['alt']
    kind, data = re.fullmatch(
      r'data:image/([a-z+]+);base64,(.*)', image['src']
    ).groups()
    data = base64.b64decode(data, validate=True)
    kinds[kind] += 1
    if kind == 'png':
      with Image.open(io.BytesIO(data)) as file:
        file.load()
        columns = 5 if 'Row' in image['alt'] else 4
        assert file.size == (columns * 96 + (columns - 1) * 4, 96)
    else:
      assert ElementTree.fromstring(data).tag.endswith('svg')
  # Four rows and two classes; val/psnr of all, then three panels a run.
  assert kinds == {'png': 6, 'svg+xml': 1 + 3 * 3}


def test_png_files_hold_the_pictures(written):
  made, path, _ = written
  for name, rows, columns in (('comparison', 4, 5), ('samples', 2, 4)):
    with Image.open(path.parent / f'{name}.png') as file:
      pixels = np.array(file)
    # A long caption may make its row taller, never lower.
    assert pixels.shape[0] >= rows * 96 + (rows + 1) * 10
    assert pixels.shape[1] > columns * 96 + (columns - 1) * 4
    first = pictures.strip(
      made.comparison.rows[0].images
      if name == 'comparison'
      else made.samples.classes['ring']
    )
    width = first.shape[1]
    np.testing.assert_array_equal(pixels[10:106, -width - 10 : -10], first)


def test_every_score_stands_with_its_protocol(written):
  made, _, page = written
  cells = [[' '.join(cell.split()) for cell in row] for row in page.rows]
  for score, value, arrow in zip(
    made.scores, ('19.00', '45.68', '0.5000'), (' ↑', ' ↓', ''), strict=True
  ):
    how = scores.in_words(score.protocol)
    row = [score.run, score.metric + arrow, value, how]
    assert row in cells
  text = ' '.join(data for (at, _), data in page.texts if at == 'figcaption')
  for protocol in (made.comparison.protocol, made.samples.protocol):
    assert protocol in text


def test_numbers_are_right_aligned(written):
  _, path, _ = written
  text = path.read_text()
  assert '<td class="n">45.68</td>' in text
  assert re.search(r'\.n \{[^}]*text-align: right', text)


def test_texts_of_users_are_escaped(written):
  made, path, page = written
  assert _HOSTILE not in path.read_text()
  assert 'b' not in {tag for tag, _ in page.tags}
  all_text = '\n'.join(data for _, data in page.texts)
  for text in (
    made.title,
    made.runs[1].name,
    made.runs[1].workdir,
    made.notes[0],
    'cross ' + _HOSTILE,
  ):
    assert text in all_text
  alts = [image['alt'] for image in page.images]
  assert f'Samples of class cross {_HOSTILE}' in alts


def test_parameters_have_totals_and_say_what_was_trained(written):
  _, _, page = written
  rows = [row for row in page.rows if len(row) == 3]
  for row in (
    ['encoder', '1,000trained', '1,000frozen'],
    ['decoder', '234trained', '–'],
    ['aligner', '–', '5,678trained'],
    ['Trained', '1,234', '5,678'],
    ['Frozen', '0', '1,000'],
  ):
    assert row in rows
  assert ['losses', '–', '0'] not in rows


def test_operations_have_totals(written):
  _, _, page = written
  rows = [row for row in page.rows if len(row) == 3]
  assert ['encoder', '2.00 / 7.00', '2.00 / 7.00'] in rows
  assert ['losses', '–', '2.00 / 7.00'] in rows
  assert ['Total', '4.00 / 14.00', '6.00 / 21.00'] in rows


def test_compiled_steps_tell_memory_and_rate(written):
  made, _, page = written
  pairs = [data for (at, _), data in page.texts if at in ('dt', 'dd')]
  first, _, last = (run.name for run in made.runs)
  # 9 images/s of 2 components, 6 GFLOPs each without recomputation.
  rate = '9.00 images/s while training (median), 108.0 GFLOP/s'
  assert pairs[pairs.index(first) + 1] == rate
  told = pairs[pairs.index(last) + 1]
  assert told.startswith('memory per device: 2.0 GiB (state 1.0 GiB')
  assert 'compile time: 1 min 15 s' in told


def test_configs_runs_and_environment_are_there(written):
  made, path, page = written
  pairs = [data for (at, _), data in page.texts if at in ('dt', 'dd')]
  assert pairs[pairs.index('model.codebook.size') + 1] == '77'
  assert pairs[pairs.index('cores') + 1] == '2'
  assert [made.runs[0].name, 'tokenizer', '1,600', '3 min 05 s'] in [
    row[:4] for row in page.rows
  ]


def test_good_stages_are_said_to_be_in_order(written):
  _, _, page = written
  assert not page.text('p', 'notice')
  (line,) = page.text('p', 'in-order')
  assert line.startswith('Each stage reconstructs at least as well')
  assert '20.50 dB (Stage 1' in line


def test_a_regression_and_an_unbeaten_baseline_are_notices(tmp_path):
  made = _report(tmp_path, psnrs=(19.0, 21.25, 20.5), baseline=20.9)
  page = page_lib.Page(report.render(made))
  assert not page.text('p', 'in-order')
  worse, *unbeaten = page.text('p', 'notice')
  stage = made.runs[1].name
  assert worse == (
    f'Scaled aligner reconstructs worse than {stage}: PSNR 20.50 dB against '
    f'21.25 dB.'
  )
  assert [x.split(' does not beat')[0] for x in unbeaten] == [
    'SoftVQ baseline', 'Scaled aligner',
  ]  # fmt: skip
  assert '19.00 against 20.90' in unbeaten[0]


def test_everything_but_the_title_may_be_left_out(tmp_path):
  path = report.write_report(report.Report(title='Bare'), tmp_path)
  page = page_lib.Page(path.read_text())
  assert [p.name for p in tmp_path.iterdir()] == ['report.html']
  assert not page.images
  assert not {'h2', 'a'} & {tag for tag, _ in page.tags}
  unlogged = report.Run('r', '/w', 'tokenizer', 1, 1.0)
  only_runs = report.Report(title='Runs', runs=[unlogged])
  tags = [
    attrs.get('id') for _, attrs in page_lib.Page(report.render(only_runs)).tags
  ]
  assert 'runs' in tags
  assert 'curves' not in tags


def test_a_page_goes_into_an_object_store(written, store, bucket):
  made, local, _ = written
  path = report.write_report(made, f'{bucket}/a page')
  assert str(path) == f'{bucket}/a page/report.html'
  names = sorted(file.name for file in local.parent.glob('*.*'))
  assert set(store.names(f'{bucket}/a page')) <= set(names)
  for name in store.names(f'{bucket}/a page'):
    wanted = (local.parent / name).read_bytes()
    assert store.read(f'{bucket}/a page/{name}') == wanted


def test_the_same_report_is_the_same_page(written):
  made, path, _ = written
  assert report.render(made) == path.read_text()


def test_unequal_rows_and_missing_metrics_write_no_page(tmp_path):
  made = _report(tmp_path)
  out = tmp_path / 'out'
  short = report.Reconstruction('short', _images(3), 20.0)
  rows = report.Comparison([*made.comparison.rows, short], 'protocol')
  with pytest.raises(errors.UserError, match='as many images of one size'):
    report.write_report(dataclasses.replace(made, comparison=rows), out)
  lost = report.Run('r', '/w', 'tokenizer', 1, 1.0, tmp_path / 'lost.jsonl')
  with pytest.raises(errors.UserError, match=r'lost.jsonl cannot be read'):
    report.write_report(dataclasses.replace(made, runs=[lost]), out)
  assert not out.exists()


@pytest.mark.parametrize(
  'make',
  [
    lambda: scores.Score('run', 'psnr', 20.0, {}),
    lambda: report.Comparison([], ''),
    lambda: report.Samples({}, ''),
  ],
)
def test_nothing_is_reported_without_its_protocol(make):
  with pytest.raises(errors.UserError, match='No protocol was given'):
    make()


def test_names_tell_runs_and_rows_apart():
  run = report.Run('twin', '/w', 'tokenizer', 1, 1.0)
  with pytest.raises(errors.UserError, match=r"different names .*'twin'"):
    report.Report(title='t', runs=[run, run])
  row = report.Reconstruction('twin', np.zeros((1, 2, 2, 3), np.uint8))
  with pytest.raises(errors.UserError, match=r"different names .*'twin'"):
    report.Comparison([row, row], 'protocol')


@pytest.mark.parametrize(
  ('stages', 'worse'),
  [
    ([], []),
    ([('a', 20.0)], []),
    ([('a', 20.0), ('b', 20.0), ('c', 21)], []),
    ([('a', 20.0), ('b', 19.0), ('c', 21.0)], [('b', 'a')]),
    # Half mended is still worse than the best before.
    ([('a', 20.0), ('b', 18.0), ('c', 19.0)], [('b', 'a'), ('c', 'a')]),
    ([('a', 20.0), ('b', float('nan')), ('c', 20.0)], [('b', 'a')]),
    ([('a', float('nan')), ('b', 3.0), ('c', 2.0)], [('c', 'b')]),
  ],
)
def test_regressions(stages, worse):
  sentences = report.regressions(stages)
  assert len(sentences) == len(worse)
  for sentence, (later, earlier) in zip(sentences, worse, strict=True):
    assert sentence.startswith(f'{later} reconstructs worse than {earlier}:')


def test_regressions_show_numbers_that_differ():
  (sentence,) = report.regressions([('a', 21.4004), ('b', 21.4001)])
  assert 'PSNR 21.4001 dB against 21.4004 dB' in sentence


def _last(**last):
  return {
    name.replace('__', '/'): curves.Series(
      np.array([1, 2]), np.array([50.0, value])
    )
    for name, value in last.items()
  }


def test_unbeaten_baselines_compare_last_scores():
  metrics = _last(
    val__psnr=12.0,
    val__psnr_mean_image=11.9,
    val__psnr_mean_colour=12.0,
    val__ssim=0.2,
    val__ssim_mean_image=0.35,
    loss=1.0,
    loss_mean_image=2.0,
  )
  assert report.unbeaten_baselines('tiny', metrics) == [
    'tiny does not beat the trivial baseline "mean colour": val/psnr 12.00 '
    'against 12.00.',
    'tiny does not beat the trivial baseline "mean image": val/ssim 0.20 '
    'against 0.35.',
  ]
  assert not report.unbeaten_baselines('none', _last(loss=1.0))


def test_a_score_that_is_not_a_number_beats_nothing():
  metrics = _last(val__psnr=float('nan'), val__psnr_mean_image=1.0)
  assert len(report.unbeaten_baselines('broken', metrics)) == 1
