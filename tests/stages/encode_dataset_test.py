import jax
import numpy as np
import pytest

from selfboottok_jax import data, errors
from selfboottok_jax.data import token_cache, token_cache_writer
from selfboottok_jax.stages import (
  encode_dataset,
  frozen_encoders,
  inputs,
)
from tests.launch import encodes


def _write_in_process(encoding, tokenizer, config, out, batch_size):
  """All of val in two shards, on the eight devices of this process."""
  source = inputs.open_data(config, 'val')
  index = token_cache.Index(
    16,
    'float32',
    {name: leaf.shape for name, leaf in encoding.shapes.items()},
    source.class_names,
    frozen_encoders.made_by(config, encoding, tokenizer.fingerprint),
    {'val': token_cache.Split(len(source), 2, source.fingerprint)},
  )
  token_cache.write_index(out, index)
  counts = encode_dataset.write_shards(
    encode_dataset.CacheEncoder(encoding, 'float32', batch_size),
    source,
    str(out),
    index,
    'val',
    [0, 1],
  )
  return source, list(counts)


def test_devices_share_a_batch(runs, photos, tmp_path):
  config = encodes.config(runs, photos)
  tokenizer, encoding = encodes.encoding(runs, config)
  assert jax.local_device_count() == 8
  _, counts = _write_in_process(encoding, tokenizer, config, tmp_path, 16)
  assert counts == [4, 4]
  _, wanted = encodes.online(config, encoding, 'val')
  index = token_cache.read_index(tmp_path)
  token_cache_writer.finish(tmp_path, index, 'val')
  source = data.open_token_cache(tmp_path, 'val')
  for i in range(8):
    for name, values in wanted.items():
      np.testing.assert_allclose(source[i][name], values[i], atol=2e-5)
  with pytest.raises(errors.ConfigError, match='--batch_size=12 does not'):
    encode_dataset.CacheEncoder(encoding, 'float32', 12)


def test_what_fails_in_the_writing_thread_ends_the_command(
  runs, photos, tmp_path
):
  config = encodes.config(runs, photos)
  tokenizer, encoding = encodes.encoding(runs, config)
  broken = {**encoding.params}
  broken['tokenizer'] = jax.tree.map(lambda a: a * np.nan, broken['tokenizer'])

  class Broken(type(encoding)):
    params = broken

  bad = Broken(
    encoding.tokenizer, encoding.teacher, encoding.has_cls, encoding.align_mode
  )
  with pytest.raises(errors.DataError, match='codes of image 0 of val are not'):
    _write_in_process(bad, tokenizer, config, tmp_path, 8)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['cache.json']


@pytest.mark.slow
def test_rates_of_writing_and_of_the_encoder_are_compared(
  server, runs, photos, tmp_path
):
  result = encodes.encode(
    server, runs, photos, tmp_path / 'cache', '--measure', '--batch_size=1'
  )
  last = result.out.splitlines()[-1]
  assert last.startswith('written at ')
  assert 'images/s, the encoder alone makes ' in last
  assert last.endswith('%')
