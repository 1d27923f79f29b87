import threading
import time

from selfboottok_jax import data
from selfboottok_jax.stages import encode_rates
from tests.launch import encodes


def test_rates_of_writing_and_of_the_encoder_are_told(
  server, runs, photos, tmp_path
):
  result = encodes.encode(
    server, runs, photos, tmp_path / 'cache', '--measure', '--batch_size=1'
  )
  last = result.out.splitlines()[-1]
  assert last.startswith('written at ')
  assert 'images/s, the encoder alone makes ' in last
  assert last.endswith('%')


def test_nothing_is_decoded_while_the_encoder_is_timed():
  seen = []

  def time_encoder(count):
    reader.start()
    time.sleep(0.2)
    seen.append(len(read))
    return 0.5 * count

  rates = encode_rates.Rates(time_encoder, batch_size=10)
  source, read = rates.gated(data.ProceduralSource('val', 8)), []
  reader = threading.Thread(target=lambda: read.append(source[0]))
  assert [rates.due() for _ in range(2 * encode_rates.EVERY)].count(True) == 2
  rates.take()
  reader.join(10)
  assert seen == [0]
  assert len(read) == 1
  assert len(source) == 2000
  rates.add(30)
  assert 'the encoder alone makes 20.0 images/s' in rates.summary()
