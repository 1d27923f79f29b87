import json

from tests.launch import pictures


def test_scores_a_tokenizer_on_photographs(server, runs, photos):
  result = server.run(
    'evaluate',
    f'--workdir={runs / "tokenizer"}',
    f'--config.data.path={photos}',
    '--config.networks.perceptual=hog',
  )
  assert result.code == 0, result.err
  records = json.loads((runs / 'tokenizer' / 'scores.json').read_text())
  line = json.loads(result.out.splitlines()[-1])
  assert line == records
  metrics = {record['metric'] for record in records}
  assert {'psnr', 'ssim', 'codes_used_global', 'distance_hog'} <= metrics
  for record in records:
    assert f'8 images of {photos}' in record['protocol']['reference']


def test_scores_a_generator_and_leaves_its_tokenizer_alone(server, runs):
  before = pictures.contents(runs / 'scaled')
  result = server.run(
    'evaluate',
    f'--workdir={runs / "generator"}',
    f'--tokenizer={runs / "scaled"}',
    '--config.num_samples=8',
    '--config.data.num_images=8',
    '--config.data.batch_size=4',
  )
  assert result.code == 0, result.err
  scores = json.loads((runs / 'generator' / 'scores.json').read_text())
  assert [s['metric'] for s in scores] == [
    'fd_hog',
    'fd_hog_gaussian_codes',
  ]
  assert all(score['value'] >= 0 for score in scores)
  assert all(s['protocol']['reference'].startswith('8 ') for s in scores)
  assert pictures.contents(runs / 'scaled') == before
