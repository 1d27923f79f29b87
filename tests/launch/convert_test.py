import json
import pathlib

import numpy as np
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import (
  lpips,
  mobilenet,
  released_softvq,
  store,
  weight_files,
)
from tests.pretrained import fake_hub, weight_files_test, weights


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> str:
  shapes = weights.wanted(lpips.assemble, lpips.squeeze())
  path = tmp_path_factory.mktemp('source') / 'squeeze.npz'
  return weights.save(path, weights.random_lpips(shapes))


def _run(server, cache, *arguments, **variables):
  return server.run(
    'convert', *arguments, SELFBOOTTOK_CACHE=str(cache), **variables
  )


def test_imports_into_the_cache_and_says_so_in_one_line(
  server, source, tmp_path
):
  cache = tmp_path / 'cache'
  for _ in range(2):
    result = _run(server, cache, f'--network=lpips_squeeze:{source}')
    assert (result.code, result.err) == (0, '')
    (line,) = result.out.splitlines()
    digest = store.sha256(pathlib.Path(source))
    for part in ('lpips_squeeze: 0.7M', source, digest, str(cache)):
      assert part in line
    params = pathlib.Path(line.split(' in ')[-1])
    assert params.is_file()
    assert len(list((cache / 'weights').iterdir())) == 1


@pytest.mark.parametrize('out', ['deep/folder', 'squeeze.safetensors'])
def test_what_is_written_serves_another_machine(
  server, source, tmp_path, monkeypatch, out
):
  place = tmp_path / out
  given = f'--network=lpips_squeeze:{source}', f'--out={place}'
  result = _run(server, tmp_path / 'cache', *given)
  assert result.code == 0, result.err
  monkeypatch.setenv('SELFBOOTTOK_CACHE', str(tmp_path / 'second'))
  network = pretrained.load_perceptual(f'lpips_squeeze:{place}')
  wanted = pretrained.load_perceptual(f'lpips_squeeze:{source}')
  for name, array in wanted.params.items():
    np.testing.assert_array_equal(network.params[name], array)
  params = place if place.is_file() else place / store.PARAMS
  record = params.with_suffix('.json')
  record = record if place.is_file() else place / store.RECORD
  digest = json.loads(record.read_text())['params_sha256']
  assert digest == store.sha256(params)
  before = params.stat()
  again = _run(server, tmp_path / 'cache', *given)
  assert 'nothing is overwritten' in again.error
  assert params.stat().st_mtime_ns == before.st_mtime_ns


def test_lists_what_is_published(server, tmp_path):
  result = _run(server, tmp_path, '--list')
  assert (result.code, result.err) == (0, '')
  rows = {line.split()[0]: line for line in result.out.splitlines()[2:]}
  assert rows.keys() == pretrained.published_networks().keys()
  for part in ('14.7M', 'BSD', 'vgg16-397923af.pth', 'perceptual'):
    assert part in rows['lpips_vgg']
  for part in ('86.6M', 'Apache-2.0', 'facebook/dinov2-base'):
    assert part in rows['dinov2_b']


@pytest.mark.parametrize(
  ('kind', 'said'),
  [
    ('cut', 'not an intact'),
    ('another network', 'holds another network'),
    ('objects', 'allow_pickle'),
    ('missing', 'no weight file'),
    ('picture', 'PNG'),
  ],
)
def test_a_bad_file_is_one_error_and_the_cache_unharmed(
  server, source, tmp_path, kind, said
):
  path, cache = tmp_path / 'weights.npz', tmp_path / 'cache'
  trace = tmp_path / 'trace'
  if kind == 'cut':
    path.write_bytes(pathlib.Path(source).read_bytes()[:-100])
  elif kind == 'another network':
    weights.save(
      path, weights.random_mobilenet(weights.wanted(mobilenet.assemble))
    )
  elif kind == 'objects':
    evil = np.array([weight_files_test.Evil(trace)], dtype=object)
    np.savez(path, **{'features.0.weight': evil})
  elif kind == 'picture':
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(99))
  result = _run(server, cache, f'--network=lpips_squeeze:{path}')
  assert said in result.error
  assert str(path) in result.error
  assert not cache.exists()
  assert not trace.exists()


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    ((), '--network not given'),
    (('--network=dinov9',), 'wanted one of hog'),
    (('--network=hog',), 'no weights to import'),
    (('--network=hog', '--options=bins'), 'wanted NAME=VALUE'),
    (('--network=dct', '--options=dim=3,size=4'), 'no option size'),
    (('--network=hog', '--out=weights.pth'), 'as .safetensors alone'),
    (('--network=hog', '--out=/dev/null/x'), 'is no folder'),
    (('hog',), "unexpected argument 'hog'"),
  ],
)
def test_flags_that_cannot_be_used(server, tmp_path, arguments, said):
  assert said in _run(server, tmp_path, *arguments).error


def test_without_a_connection_it_says_what_to_bring(server, tmp_path):
  endpoint = {'HF_ENDPOINT': fake_hub.refusing()}
  given = '--network=lpips_squeeze:org/net'
  error = _run(server, tmp_path / 'cache', given, **endpoint).error
  for file in lpips.PUBLISHED['squeeze'].files:
    assert file in error
  assert 'lpips_squeeze:FOLDER' in error


def test_options_reach_the_network(tmp_path):
  path = weights.save(
    tmp_path / 'm.npz',
    weights.random_mobilenet(weights.wanted(mobilenet.assemble)),
  )
  (record,) = pretrained.import_network(f'mobilenet_v2:{path}', image_size=64)
  assert record['network'] == 'mobilenet_v2'
  count = sum(
    array.size for array in weight_files.read(record['params']).values()
  )
  assert round(count / 1e6, 1) == 3.5
  with pytest.raises(errors.UserError, match='no option grid'):
    pretrained.import_network(f'mobilenet_v2:{path}', grid=4)


def test_whatever_is_published_can_be_imported():
  runs = released_softvq.RELEASED
  for name in pretrained.published_networks().keys() - runs.keys():
    with pytest.raises(errors.WeightsError, match='no weight file at'):
      pretrained.import_network(f'{name}:/no/such/file')


def test_trunks_of_a_discriminator_are_networks_too(tmp_path):
  with pytest.raises(errors.UserError, match='no option grid'):
    pretrained.import_network(f'dino_s16:{tmp_path}', grid=4)
  with pytest.raises(errors.ConfigError, match='no weights to import'):
    pretrained.import_network('dino_tiny:random')


def test_a_tokenizer_is_sent_where_it_becomes_a_run():
  with pytest.raises(errors.ConfigError, match='launch.import_softvq'):
    pretrained.import_network('softvq_b64:FILE')


def test_export(source, tmp_path):
  (record,) = pretrained.import_network(f'lpips_squeeze:{source}')
  params = pathlib.Path(record['params'])
  copy = store.export(params, tmp_path / 'a')
  assert copy.read_bytes() == params.read_bytes()
  (tmp_path / 'file').touch()
  with pytest.raises(errors.ConfigError, match='cannot be written'):
    store.export(params, tmp_path / 'file' / 'a')


def test_listing(server):
  result = server.run('convert', '--list')
  header, line, *rows = result.out.splitlines()
  assert header.split()[:3] == ['network', 'parameters', 'licence']
  assert set(line) == {'-', ' '}
  names = {row.split()[0] for row in rows}
  assert names == set(pretrained.published_networks())
