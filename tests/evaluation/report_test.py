import base64
import dataclasses
import io
import itertools
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from selfboottok_jax import errors
from selfboottok_jax.evaluation import (
  comparisons,
  cost,
  curves,
  flops,
  pictures,
  report,
  scores,
)
from tests.evaluation import page as page_lib

HEADINGS = ('h1', 'h2', 'h3', 'h4')
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
    stages=list(zip(names, psnrs, strict=True)),
    comparisons=[
      comparisons.Comparison(
        [
          comparisons.Row('Originals', _images(5)),
          *(
            comparisons.Row(name, _images(5, i), psnr)
            for i, (name, psnr) in enumerate(zip(names, psnrs, strict=True), 1)
          ),
        ],
        f'first five of 1,000 images {_HOSTILE}',
      )
    ],
    samples=[
      report.Samples(
        names[2],
        {'ring': _images(4), f'cross {_HOSTILE}': _images(4, 1)},
        'Heun, 25 steps',
      )
    ],
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
    'comparison.png', 'curves', 'report.html', 'report.md', 'samples.png',
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


def test_headings_are_in_order(written):
  levels = [int(tag[1]) for tag, _ in written[2].tags if tag in HEADINGS]
  assert levels[0] == 1
  assert levels.count(1) == 1
  assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


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
        assert file.size == (8, 8)
    else:
      assert ElementTree.fromstring(data).tag.endswith('svg')
  # Four rows and three of differences, of five pictures; four samples of each
  # class. val/psnr of all runs, then two panels a run.
  assert kinds == {'png': 5 * 7 + 4 * 2, 'svg+xml': 1 + 3 * 2}
  # Every pixel is one of the picture's own.
  (first,) = (i for i in page.images if i['alt'] == 'Originals, picture 1')
  data = base64.b64decode(first['src'].partition(',')[2])
  np.testing.assert_array_equal(
    np.array(Image.open(io.BytesIO(data))),
    made.comparisons[0].rows[0].images[0],
  )


def test_png_files_hold_the_pictures(written):
  made, path, _ = written
  for name, rows, columns in (('comparison', 7, 5), ('samples', 2, 4)):
    with Image.open(path.parent / f'{name}.png') as file:
      pixels = np.array(file)
    # A long caption may make its row taller, never lower.
    assert pixels.shape[0] >= rows * 96 + (rows + 1) * 10
    assert pixels.shape[1] > columns * 96 + (columns - 1) * 4
    first = pictures.strip(
      made.comparisons[0].rows[0].images
      if name == 'comparison'
      else made.samples[0].classes['ring']
    )
    width = first.shape[1]
    np.testing.assert_array_equal(pixels[10:106, -width - 10 : -10], first)


def test_markdown_shows_files_that_are_there(written):
  made, path, _ = written
  text = (path.parent / 'report.md').read_text()
  shown = re.findall(r'\]\((.*?)\)', text)
  assert len(shown) == 2 + 1 + 3 * 2
  for name in shown:
    assert (path.parent / name).is_file(), name
  assert '<script' not in text
  lines = text.splitlines()
  place = lines.index('| psnr ↑ [1] | 19.00 |')
  assert lines[place - 1] == '| --- | ---: |'
  assert '- [1] count 1000' in lines
  for line, before in zip(lines[1:], lines, strict=False):
    # A heading or a table begins after an empty line.
    if line.startswith('#') or (line[:1] == '|' and before[:1] != '|'):
      assert not before, (before, line)


def test_scores_stand_by_run_with_their_protocols(written):
  made, _, page = written
  cells = [[' '.join(cell.split()) for cell in row] for row in page.rows]
  for row in (
    ['Metric', f'{made.runs[0].name}a'],
    ['psnr ↑1', '19.00'],
    ['fd_hog ↓2', '45.68'],
    ['usage', '0.5000'],
  ):
    assert row in cells
  notes = [data for (at, _), data in page.texts if at in ('li', 'span')]
  for mark, how in (
    ('1', 'count 1000'), ('2', f'reference {_HOSTILE}'), ('a', 'step 7'),
    ('b', 'step 1600'),
  ):  # fmt: skip
    assert notes[notes.index(mark) + 1] == how
  assert notes.count('a') == 1
  text = ' '.join(data for (at, _), data in page.texts if at == 'figcaption')
  for shown in (made.comparisons[0], made.samples[0]):
    assert shown.protocol in text


def test_numbers_are_right_aligned(written):
  _, path, _ = written
  text = path.read_text()
  assert '<td class="n"><span class="value">45.68</span></td>' in text
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
  assert f'Sample of class cross {_HOSTILE}, picture 1' in alts


def test_costs_have_totals_and_say_what_was_trained(written):
  _, _, page = written
  rows = [[' '.join(cell.split()) for cell in row] for row in page.rows]
  for row in (
    ['SoftVQ baseline', '1,234', '0', '4.00', '14.00'],
    ['Scaled aligner', '5,678', '1,000', '6.00', '21.00'],
    ['encoder trained', '1,000', '2.00', '7.00'],
    ['encoder frozen', '1,000', '2.00', '7.00'],
    ['losses', '–', '2.00', '7.00'],
    ['Total', '6,678', '6.00', '21.00'],
  ):
    assert row in rows


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
  assert {p.name for p in tmp_path.iterdir()} == {'report.html', 'report.md'}
  assert (tmp_path / 'report.md').read_text() == '# Bare\n'
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
  assert {'report.html', 'report.md'} <= set(store.names(f'{bucket}/a page'))
  for name in store.names(f'{bucket}/a page'):
    wanted = (local.parent / name).read_bytes()
    assert store.read(f'{bucket}/a page/{name}') == wanted


def test_the_same_report_is_the_same_page(written):
  made, path, _ = written
  assert report.render(made) == path.read_text()


def test_missing_metrics_write_no_page(tmp_path):
  made = _report(tmp_path)
  out = tmp_path / 'out'
  lost = report.Run('r', '/w', 'tokenizer', 1, 1.0, tmp_path / 'lost.jsonl')
  with pytest.raises(errors.UserError, match=r'lost.jsonl cannot be read'):
    report.write_report(dataclasses.replace(made, runs=[lost]), out)
  assert not out.exists()


@pytest.mark.parametrize(
  'make',
  [
    lambda: scores.Score('run', 'psnr', 20.0, {}),
    lambda: report.Samples('run', {}, ''),
  ],
)
def test_nothing_is_reported_without_its_protocol(make):
  with pytest.raises(errors.UserError, match='No protocol was given'):
    make()


def test_names_tell_runs_apart():
  run = report.Run('twin', '/w', 'tokenizer', 1, 1.0)
  with pytest.raises(errors.UserError, match=r"different names .*'twin'"):
    report.Report(title='t', runs=[run, run])


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


def test_the_papers_tables_stand_beside_the_runs(tmp_path):
  made = _report(tmp_path)
  config = {
    'model': {'local1d_width': 0, 'local2d_depth': 0, 'bootstrap_from': 'q'}
  }
  beside = dataclasses.replace(
    made, configs={made.runs[0].name: config}, has_paper=True
  )
  page = page_lib.Page(report.render(beside))
  rows = [[' '.join(cell.split()) for cell in row] for row in page.rows]
  assert ['rFID', '0.88', '0.88', 'not run'] in rows
  assert [
    'PSNR', '–', '–', 'not run; psnr 19.00 (SoftVQ baseline)'
  ] in rows  # fmt: skip
  assert [row[2] for row in rows if row[0].startswith('Generator and al')] == [
    'model.bootstrap_from: q'
  ]


def test_terms_of_a_training_are_folded():
  metrics = _last(
    val__psnr=1.0,
    val__perplexity=2.0,
    loss=1.0,
    loss__pixel=1.0,
    fusion__gate=3.0,
    learning_rate=0.1,
  )
  (drawn,) = report.curves_of_runs({'run': metrics})
  assert [
    (heading, [panel.metric for panel in panels])
    for heading, panels in drawn.groups
  ] == [
    ('', ['loss', 'val/psnr']),
    ('Codebooks', ['val/perplexity']),
    ('Terms of the loss', ['loss/pixel']),
    ('Fusion', ['fusion/gate']),
    (curves.REST, ['learning_rate']),
  ]
  assert len({panel.file for panel in drawn.panels}) == 6
