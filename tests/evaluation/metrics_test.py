import pytest

from selfboottok_jax import errors
from selfboottok_jax.evaluation import metrics


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
  """A machine without weights."""
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(tmp_path))
  return tmp_path


def test_metrics_are_sorted_by_what_they_need():
  plan = metrics.parse(
    ['rfid', 'psnr', 'lpips_squeeze:W', 'usage', 'fd_hog', 'distance_hog']
  )
  assert plan.paired == ('psnr',)
  assert plan.distances == {
    'lpips_squeeze': 'lpips_squeeze:W',
    'distance_hog': 'hog',
  }
  assert plan.codes == ('usage',)
  assert plan.sets == ('rfid', 'fd_hog')
  assert plan.networks == {'inception': 'inception', 'hog': 'hog'}
  # A network is loaded once, from where one of its metrics says.
  plan = metrics.parse(['fid', 'is:FILE', 'prec_recall'])
  assert plan.networks == {'inception': 'inception:FILE'}
  assert plan.sets == ('fid', 'is', 'precision', 'recall')
  # Without another network neighbours are Inception's.
  assert metrics.parse(['precision']).networks == {'inception': 'inception'}
  assert metrics.parse(['precision', 'fd_hog']).networks == {'hog': 'hog'}


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ([], 'is empty'),
    ([''], 'is empty'),
    (['pnsr'], "'pnsr' is no metric; wanted psnr"),
    (['rfdi'], 'rfid'),
    (['lpips_vvg'], 'lpips_vgg'),
    (['fd_mobilenet'], 'fd_mobilenet_v2'),
    (['zzzzzz'], 'fd_NETWORK'),
    (['psnr:FILE'], 'psnr reads no network'),
    (['pnsr:FILE'], 'is no metric'),
    (['fid:A', 'is:B'], 'two sources of inception'),
    (['gaussian_codes'], 'alone'),
    (['fdr'], 'two networks or more'),
    (['fdr', 'fd_hog'], 'two networks or more'),
  ],
)
def test_other_names(given, told):
  with pytest.raises(errors.ConfigError, match=told) as caught:
    metrics.parse(given)
  assert '--metrics' in str(caught.value)


@pytest.mark.parametrize(
  ('metric', 'there', 'told'),
  [
    ('psnr', {}, '--samples with --pairs'),
    ('lpips_vgg', {'has_reference': True}, '--samples with --pairs'),
    ('usage', {'has_pairs': True}, 'a tokenizer as --workdir'),
    ('rfid', {'has_reference': True}, 'or the metric fid'),
    ('fid', {'has_pairs': True}, 'the metric rfid'),
    ('recall', {}, 'wanted --reference'),
    ('fd_hog', {}, 'wanted --reference'),
    ('fdr,fd_hog,fd_random', {'has_reference': True}, '--validation'),
  ],
)
def test_what_a_metric_needs(metric, there, told):
  with pytest.raises(errors.ConfigError, match=told):
    metrics.parse([*metric.split(','), 'is']).check('--samples=x', **there)
  everything = dict.fromkeys(
    ('has_pairs', 'has_codes', 'has_reference', 'has_validation'), True
  )
  metrics.parse(metric.split(',')).check('--samples=x', **everything)


def test_the_inception_score_needs_nothing():
  metrics.parse(['is']).check('--samples=x')
  with pytest.raises(errors.ConfigError, match='a generator as --workdir'):
    metrics.parse(['is', 'gaussian_codes']).check('--samples=x')


def _defaults(sources=(), **there):
  names = ('has_pairs', 'has_codes', 'has_reference', 'samples')
  all_of_them = dict.fromkeys(names, False) | there
  return metrics.defaults(dict(sources), **all_of_them)


def test_defaults_are_what_is_possible(no_weights):
  tokenizer = _defaults(has_pairs=True, has_codes=True)
  assert tokenizer == [
    *('psnr', 'ssim', 'ssim_range2'),
    *('usage', 'perplexity', 'latents', 'fd_hog'),
  ]
  generator = _defaults(has_reference=True, samples=True)
  assert generator == ['fd_hog', 'gaussian_codes']
  for name in ('inception', 'lpips_alex'):
    folder = no_weights / 'files' / name
    folder.mkdir(parents=True)
    for file in (
      'alexnet-owt-7be5be79.pth',
      'alex.pth',
      'pt_inception-2015-12-05-6726825d.pth',
    ):
      (folder / file).write_bytes(b'x')
  assert _defaults(has_pairs=True) == [
    *('psnr', 'ssim', 'ssim_range2', 'lpips_alex', 'rfid'),
  ]
  assert _defaults(has_reference=True, samples=True) == [
    *('fid', 'sfid', 'is', 'precision', 'recall'),
  ]
  assert metrics.parse(['lpips']).distances == {'lpips_alex': 'lpips_alex'}


def test_networks_of_a_training_keep_their_source(no_weights):
  (no_weights / 'weights.npz').write_bytes(b'x')
  spec = f'lpips_vgg:{no_weights / "weights.npz"}'
  sources = {'lpips_vgg': spec, 'lpips_alex': 'lpips_alex:absent'}
  assert 'lpips_vgg' in _defaults(sources, has_pairs=True)
  for given in ('lpips_vgg', 'lpips'):
    plan = metrics.parse([given], sources)
    assert plan.distances == {'lpips_vgg': spec}
  # What the user names counts.
  plan = metrics.parse(['lpips_vgg:OTHER'], sources)
  assert plan.distances == {'lpips_vgg': 'lpips_vgg:OTHER'}
