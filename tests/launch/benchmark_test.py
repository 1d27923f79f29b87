import json

import pytest

# Each compiles a train step at the least.
pytestmark = pytest.mark.slow

TINY = '--config=tests/launch/tiny.py:'
RATES = ('data_images_per_second', 'training_images_per_second')


def _run(server, *arguments):
  result = server.run('benchmark', '--steps=2', '--rounds=2', *arguments)
  assert result.code == 0, result.err
  return json.loads(result.out.splitlines()[-1]), result


@pytest.mark.parametrize(
  'task',
  [
    pytest.param('tokenizer', marks=pytest.mark.long),
    *('scaling', 'generator'),
  ],
)
def test_times_every_task_without_its_tokenizer(task, server, tmp_path):
  # Its critic starts on the way: the phase with it is timed.
  start = [] if task == 'generator' else ['--config.loss.adversarial_start=0.5']
  out = tmp_path / 'new' / 'benchmark.json'
  record, result = _run(server, f'{TINY}{task}', f'--out={out}', *start)
  assert json.loads(out.read_text()) == record
  assert record['task'] == task
  assert record['config'].startswith(f'tests/launch/tiny.py:{task}')
  assert record['batch_size'] == 4
  assert ('assumed: the tokenizer' in result.out) == (task != 'tokenizer')
  least, most = record['step_seconds_least'], record['step_seconds_most']
  assert 0 < least <= record['step_seconds'] <= most
  assert record['images_per_second'] == pytest.approx(
    4 / record['step_seconds']
  )
  assert record['tflops_per_second'] == pytest.approx(
    record['gflops_per_image'] * record['images_per_second'] / 1e3
  )
  # Scenes are built in.
  assert all(record[name] > 0 for name in RATES)
  # No table knows what a CPU could do at best.
  assert record['mfu'] is None
  assert record['peak_memory_bytes'] > record['step_memory_bytes'] > 0
  if task != 'generator':
    plain, _ = _run(server, f'{TINY}{task}', '--config.loss.adversarial=0')
    assert plain['gflops_per_image'] < record['gflops_per_image']


def test_the_suite_checks_this_machine(server, tmp_path):
  out = tmp_path / 'suite.json'
  result = server.run(
    'benchmark', '--suite', '--only=correctness', f'--out={out}'
  )
  assert result.code == 0, result.out + result.err
  *lines, last = result.out.splitlines()
  record = json.loads(last)
  assert json.loads(out.read_text()) == record
  assert (record['ok'], record['size']) == (True, 'tiny')
  names = [entry['name'] for entry in record['entries']]
  assert [line.split(':')[0] for line in lines] == [
    f'correctness {name}' for name in names
  ]
  assert 'float32_products' in names


@pytest.mark.long
@pytest.mark.slow
def test_the_suite_checks_and_times_this_machine(server, tmp_path):
  out = tmp_path / 'suite.json'
  result = server.run(
    'benchmark', '--suite', '--size=tiny', '--seconds=3000', f'--out={out}'
  )
  assert result.code == 0, result.out + result.err
  record = json.loads(result.out.splitlines()[-1])
  assert json.loads(out.read_text()) == record
  assert record['ok'] is True
  rows = {(r['group'], r['name']): r for r in record['entries']}
  assert not [r for r in rows.values() if 'skipped' in r or 'failed' in r]
  for stage in ('tokenizer', 'scaling', 'generator'):
    assert rows['training', f'{stage}_equals_cpu']['ok']
  assert rows['training', 'repeats_bit_for_bit']['ok']
  assert all(
    r['images_per_second'] > 0 and r['compile_seconds'] > 0
    for (group, _), r in rows.items()
    if group == 'steps'
  )
  (sampling,) = (r for (group, _), r in rows.items() if group == 'sampling')
  assert sampling['codes_per_second'] >= sampling['images_per_second'] > 0
  (coding,) = (r for (group, _), r in rows.items() if group == 'encoding')
  assert coding['encoded_images_per_second'] > 0
  assert coding['decoded_images_per_second'] > 0


def test_without_data_the_model_alone_is_timed(server):
  record, result = _run(server, f'{TINY}generator', '--config.data.source=auto')
  assert 'data rates not measured: data.path is empty' in result.out
  assert all(record[name] is None for name in RATES)
  assert record['loop_step_seconds'] > 0


def test_the_way_of_the_data_is_timed(server, photos, tmp_path):
  out = tmp_path / 'data.json'
  record, result = _run(
    server,
    '--data',
    f'{TINY}generator',
    '--config.data.source=auto',
    f'--config.data.path={photos}',
    f'--out={out}',
  )
  assert json.loads(out.read_text()) == record
  assert record['config'].startswith('tests/launch/tiny.py:generator')
  assert record['images'] == 8
  assert 0 <= record['data_wait'] < 1
  rates = [name for name in record if name.endswith(('second', 'per_core'))]
  assert len(rates) == 7
  times = [name for name in record if name.endswith('seconds')]
  assert len(times) == 6
  assert all(record[name] > 0 for name in rates + times)
  assert record['images_per_second'] == pytest.approx(
    record['images_per_second_per_core'] * record['cores']
  )
  slowest = max(
    ('model', 'pipeline', 'transfer'),
    key=lambda name: record[f'{name}_milliseconds'],
  )
  assert (record['bound_by'] == slowest) == (slowest != 'pipeline')
  assert 'bound by ' in result.out
  both = server.run('benchmark', '--data', '--suite')
  assert '--suite and --data are given' in both.error


def test_compile_time_is_that_of_compiling(server):
  # The second time the program lies in the cache of compiled ones.
  first, second = (
    _run(server, f'{TINY}generator')[0]['compile_seconds'] for _ in range(2)
  )
  assert second > first / 5


def test_names_its_configuration_however_it_is_written(server):
  record, _ = _run(
    server, '--config', f'{TINY[9:]}generator', '--noconfig.model.shift'
  )
  assert record['config'] == (
    'tests/launch/tiny.py:generator config.model.shift=False'
  )
