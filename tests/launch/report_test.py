import json

import pytest

from selfboottok_jax.evaluation import evaluate


def _report(server, out, *arguments):
  return server.run('report', f'--out={out}', *arguments)


@pytest.mark.slow
def test_a_page_of_a_tokenizer_and_a_generator(server, runs, tmp_path):
  scored = [
    {
      'run': 'gen',
      'metric': 'FD (hog)',
      'value': 1.25,
      'higher_is_better': False,
      'protocol': 'of a test',
    }
  ]
  (runs / 'generator' / evaluate.SCORES).write_text(json.dumps(scored))
  both = f'{runs / "tokenizer"},{runs / "generator"}'
  result = _report(
    server,
    tmp_path / 'page',
    f'--runs={both}',
    f'--tokenizer={runs / "scaled"}',
    '--per_class=2',
  )
  assert result.code == 0, result.err
  page = (tmp_path / 'page' / 'report.html').read_text()
  assert f'title="{runs / "tokenizer"}">tokenizer<' in page
  for text in ('val/velocity_loss', 'FD (hog)', '1.25', 'of a test', 'star'):
    assert text in page, text
  for name in ('samples.png', 'comparison.png', 'report.md'):
    assert (tmp_path / 'page' / name).is_file()


def test_what_no_page_can_show(server, runs, tmp_path):
  generator = runs / 'generator'
  for arguments, told in (
    ((), '--runs'),
    ((f'--runs={tmp_path}/absent',), 'is no run'),
    ((f'--runs={generator}', '--tokenizer=lost'), 'tokenizer workdir=lost'),
    ((f'--runs={runs}/softvq', '--pictures=lost'), 'lost'),
    ((f'--runs={generator}', '--per_class=-1'), '--per_class=-1'),
  ):
    result = _report(server, tmp_path / 'page', *arguments)
    assert told in result.error
  assert not (tmp_path / 'page').exists()
