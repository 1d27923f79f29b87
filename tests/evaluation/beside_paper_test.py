from selfboottok_jax import presets
from selfboottok_jax.evaluation import beside_paper, scores


def _config(preset):
  return presets.get_config(f'tokenizer:{preset}').to_dict()


def _score(run, metric, value, **protocol):
  return scores.Score(run, metric, value, protocol)


def _here(table, row, metric, configs, found):
  (shown,) = (
    s for s in beside_paper.show(configs, found) if s.table.name == table
  )
  (entry,) = (e for e in shown.entries if e.row.name == row)
  (line,) = (x for x in entry.lines if x.metric == metric)
  return line.here


LARGE = {'big': _config('imagenet256_softvq')}


def test_a_number_of_the_papers_protocol_stands_in_its_place():
  found = [
    _score('big', 'rfid', 0.91, count=50_000),
    _score('big', 'psnr', 21.5, count=50_000),
    _score('big', 'fd_hog', 9.0, count=50_000),
  ]
  assert _here('table3', 'softvq', 'rFID', LARGE, found) == '0.9100 (big)'
  assert _here('table3', 'g_l1', 'rFID', LARGE, found) == 'not run'
  assert _here('figure5', 'g', 'PSNR', LARGE, found) == '21.50 (big)'


def test_other_protocols_stand_beside_not_run():
  for score, told in (
    (_score('big', 'rfid', 2.0, count=1000), 'rfid 2.00 (big)'),
    (_score('big', 'fd_hog', 3.0, count=50_000), 'fd_hog 3.00 (big)'),
    (
      _score('big', 'rfid', 2.0, count=50_000, warning='biased'),
      'rfid 2.00 (big)',
    ),
  ):
    assert (
      _here('table3', 'softvq', 'rFID', LARGE, [score]) == f'not run; {told}'
    )


def test_small_runs_are_never_in_the_papers_place():
  config = _config('photos64')
  config['model'] |= {'local1d_width': 0, 'local2d_depth': 0}
  config['model']['bootstrap_from'] = 'quantized'
  found = [_score('small', 'rfid', 2.0, count=50_000)]
  told = _here('table3', 'softvq', 'rFID', {'small': config}, found)
  assert told == 'not run; rfid 2.00 (small)'


def test_samples_with_and_without_guidance_are_told_apart():
  config = _config('imagenet256')
  config['model'] |= {'local2d_width': 1280, 'local2d_depth': 30}
  configs = {'gen': config, 'tok': config}
  made = {'sampler': 'sde', 'count': 50_000, 'reference': 'VIRTUAL.npz'}
  found = [
    _score('gen', 'fid', 3.0, guidance=1.0, **made),
    _score('gen', 'fid', 2.0, guidance=2.3, **made),
    _score('gen', 'fd_hog_gaussian_codes', 99.0, guidance=2.3, **made),
    _score('tok', 'rfid', 0.7, count=50_000),
  ]
  for metric, told in (
    ('gFID without guidance', '3.00 (gen)'),
    ('gFID with guidance', '2.00 (gen)'),
    ('rFID', '0.7000 (tok)'),
  ):
    assert _here('table1', 'selfboottok', metric, configs, found) == told


def test_numbers_of_smaller_aligners_and_other_references_are_not_the_papers():
  small = _config('imagenet256')
  large = {**small, 'model': {**small['model']}}
  large['model'] |= {'local2d_width': 1280, 'local2d_depth': 30}
  made = {'sampler': 'sde', 'count': 50_000, 'guidance': 2.3}
  statistics = {'reference': 'VIRTUAL.npz'}
  photographs = {'reference': 'val/', 'reference_count': 50_000}
  for config, protocol in (
    (small, statistics),
    (large, photographs),
    (large, statistics | {'convention': 'pytorch_fid'}),
  ):
    found = [_score('run', 'fid', 2.0, **made, **protocol)]
    for table, row in (('table1', 'selfboottok'), ('table3', 'full')):
      told = _here(table, row, 'gFID with guidance', {'run': config}, found)
      assert told == 'not run; fid 2.00 (run)'


def test_every_printed_number_is_a_line():
  shown = beside_paper.show({}, [])
  assert [s.table.name for s in shown] == list(beside_paper.published.TABLES)
  for item in shown:
    assert not item.is_run
    for entry in item.entries:
      assert {line.here for line in entry.lines} <= {'not run'}
      printed = {**entry.row.paper, **entry.row.source}.keys() - {'tokens'}
      assert len(entry.lines) >= len(printed)
