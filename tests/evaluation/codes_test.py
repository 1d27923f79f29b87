import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax.evaluation import codes
from selfboottok_jax.models import quantizers, tokenizer

# Two codebooks of four rows far apart: an assignment is as good as hard.
ROWS = np.array([[[0, 0], [9, 0], [0, 9], [9, 9]]] * 2, np.float32)


def _output(chosen, tau=0.01):
  """A group whose tokens are rows: `chosen` has two for each codebook."""
  chosen = np.asarray(chosen)
  segments = np.stack([ROWS[n][chosen[:, n]] for n in (0, 1)], axis=1)
  tokens = jnp.asarray(segments.reshape(len(chosen), -1, 2))
  quantized = quantizers.Quantized(
    tokens, jnp.asarray(segments), jnp.asarray(ROWS), 'l2', tau
  )
  pictures = jnp.zeros((len(chosen), 8, 8, 3))
  return tokenizer.TokenizerOutput(
    pictures, tokens, {'global': tokens}, {'global': quantized}
  )


def _measure(batches, metrics=codes.METRICS, tau=0.01):
  counted = codes.CodeStatistics(metrics)
  for chosen, mask in batches:
    mask = jnp.asarray(mask)
    counted.add(codes.count_codes(_output(chosen, tau), mask), mask)
  return {name: value for name, value, _ in counted.finish()}


# The first codebook uses two codes equally often, the second one code only. The
# last image is padding.
BATCHES = [
  ([[[0, 1], [2, 2]], [[1, 0], [2, 2]]], [True, True]),
  ([[[0, 1], [2, 2]], [[3, 3], [3, 3]]], [True, False]),
]


def test_use_of_codebooks():
  found = _measure(BATCHES)
  assert found['usage_global_0'] == 0.5
  assert found['usage_global_1'] == 0.25
  assert found['usage'] == found['usage_global'] == 0.375
  # exp(entropy) of two equal shares is 2, of one is 1.
  for name in ('perplexity', 'perplexity_mean_assignment_global'):
    np.testing.assert_allclose(found[name], 1.5, rtol=1e-5)


def test_the_mean_assignment_is_soft():
  found = _measure(BATCHES, tau=1e6)
  # All rows alike, though only some are nearest.
  np.testing.assert_allclose(found['perplexity_mean_assignment'], 4, rtol=1e-4)
  np.testing.assert_allclose(found['perplexity'], 1.5, rtol=1e-6)


def test_statistics_of_tokens():
  found = _measure(BATCHES, ['latents'])
  assert set(found) == {'latent_mean_global', 'latent_std_global'}
  # Codes 0, 1 and 2, 2 of each image: of 24 numbers 3 + 6 are nines.
  share = 9 / 24
  np.testing.assert_allclose(found['latent_mean_global'], 9 * share, rtol=1e-6)
  deviation = 9 * np.sqrt(share - share**2)
  np.testing.assert_allclose(found['latent_std_global'], deviation, rtol=1e-6)


def test_batches_change_nothing():
  (first, ones), (second, _) = BATCHES
  whole = _measure([(first + second, [*ones, True, False])])
  for name, value in _measure(BATCHES).items():
    np.testing.assert_allclose(whole[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize('metric', codes.METRICS)
def test_each_number_says_what_it_is(metric):
  counted = codes.CodeStatistics([metric])
  chosen, mask = BATCHES[0]
  mask = jnp.asarray(mask)
  counted.add(codes.count_codes(_output(chosen), mask), mask)
  for name, _, protocol in counted.finish():
    assert name.startswith(metric.removesuffix('s'))
    assert protocol == {'description': protocol['description'], 'count': 2}
