import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfboottok_jax import errors
from selfboottok_jax.objectives import alignment

MODES = list(alignment.ALIGNMENTS)


def normal(seed, *shape):
  values = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(values, jnp.float32)


@pytest.mark.parametrize('mode', MODES)
def test_does_not_see_scale(mode):
  patches, tokens = normal(0, 2, 8, 5), normal(1, 2, 4, 5)
  plain = alignment.alignment_loss(patches, tokens, mode=mode)
  scaled = alignment.alignment_loss(30 * patches, 0.01 * tokens, mode=mode)
  np.testing.assert_allclose(plain, scaled, atol=1e-6)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('k', [2, 8, 16])
def test_bounds(mode, k):
  patches = normal(0, 2, 1, 5) * jnp.ones((2, 8, 1))
  tokens = patches[:, :1] * jnp.ones((2, k, 1))
  same = alignment.alignment_loss(patches, tokens, mode=mode)
  opposite = alignment.alignment_loss(patches, -tokens, mode=mode)
  np.testing.assert_allclose([same, opposite], [-1, 1], atol=1e-6)


def test_modes_agree_when_all_patches_are_equal():
  patches = normal(0, 2, 1, 5) * jnp.ones((2, 8, 1))
  tokens = normal(1, 2, 1, 5)
  values = [alignment.alignment_loss(patches, tokens, mode=m) for m in MODES]
  np.testing.assert_allclose(values, values[0], atol=1e-6)


def cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize(('n', 'k'), [(6, 3), (6, 6), (3, 6)])
def test_repeat_by_hand(n, k):
  patches, tokens = (
    np.asarray(normal(0, 2, n, 4)),
    np.asarray(normal(1, 2, k, 4)),
  )
  count = max(n, k)
  expected = -np.mean(
    [
      cosine(patches[b, i * n // count], tokens[b, i * k // count])
      for b in range(2)
      for i in range(count)
    ]
  )
  actual = alignment.alignment_loss(jnp.asarray(patches), jnp.asarray(tokens))
  np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_pool_by_hand():
  patches, tokens = (
    np.asarray(normal(0, 1, 4, 3)),
    np.asarray(normal(1, 1, 2, 3)),
  )
  pooled = patches.reshape(2, 2, 3).mean(axis=1)
  expected = -np.mean([cosine(pooled[i], tokens[0, i]) for i in range(2)])
  actual = alignment.alignment_loss(
    jnp.asarray(patches), jnp.asarray(tokens), mode='pool'
  )
  np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize('mode', MODES)
def test_zero_tokens_and_patches_have_finite_gradients(mode):
  zeros = jnp.zeros((1, 4, 3))
  for patches in (zeros, normal(0, 1, 4, 3)):
    value, gradient = jax.value_and_grad(
      lambda tokens, patches=patches: alignment.alignment_loss(
        patches, tokens, mode=mode
      )
    )(zeros)
    assert value == 0
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize('mode', MODES)
def test_patches_are_a_fixed_target(mode):
  tokens = normal(1, 2, 2, 3)
  gradient = jax.grad(
    lambda patches: alignment.alignment_loss(patches, tokens, mode=mode)
  )(normal(0, 2, 4, 3))
  np.testing.assert_array_equal(gradient, 0)


def test_low_precision_gives_float32():
  loss = alignment.alignment_loss(
    normal(0, 1, 4, 3).astype(jnp.bfloat16),
    normal(1, 1, 2, 3).astype(jnp.bfloat16),
  )
  assert loss.dtype == jnp.float32


@pytest.mark.parametrize(
  ('patches', 'tokens', 'mode', 'message'),
  [
    ((1, 9, 3), (1, 4, 3), 'repeat', '9 patches and 4 tokens'),
    ((1, 9, 3), (1, 4, 3), 'pool', '9 patches and 4 tokens'),
    ((1, 4, 3), (1, 4, 2), 'repeat', 'project the tokens to 3'),
    ((1, 4, 3), (1, 4, 3), 'nearest', "mode='nearest'"),
  ],
)
def test_what_cannot_align(patches, tokens, mode, message):
  with pytest.raises(errors.ConfigError, match=message):
    alignment.alignment_loss(jnp.ones(patches), jnp.ones(tokens), mode=mode)


def test_global_takes_any_counts():
  loss = alignment.alignment_loss(
    jnp.ones((1, 9, 3)), jnp.ones((1, 4, 3)), mode='global'
  )
  np.testing.assert_allclose(loss, -1, atol=1e-6)


@pytest.mark.parametrize('mode', MODES)
def test_targets_stand_for_the_patches(mode):
  keys = jax.random.split(jax.random.key(3))
  patches = jax.random.normal(keys[0], (2, 12, 5))
  tokens = jax.random.normal(keys[1], (2, 4, 5))
  targets = alignment.make_targets(patches, 4, mode=mode)
  assert targets.shape == (2, 1 if mode == 'global' else 4, 5)
  np.testing.assert_allclose(
    alignment.target_loss(targets, tokens),
    alignment.alignment_loss(patches, tokens, mode=mode),
    rtol=1e-6,
  )


def test_entangled_loss_is_the_mean_over_positions():
  keys = jax.random.split(jax.random.key(4), 4)
  patches = jax.random.normal(keys[0], (2, 8, 5))
  tokens = jax.random.normal(keys[1], (2, 8, 5))
  cls, token = (jax.random.normal(k, (2, 5)) for k in keys[2:])
  # As many patches as tokens: REG's mean cosine over [cls; patches].
  whole = alignment.alignment_loss(
    jnp.concatenate([cls[:, None], patches], axis=1),
    jnp.concatenate([token[:, None], tokens], axis=1),
  )
  targets = alignment.make_targets(patches, 8)
  both = alignment.entangled_loss(targets, tokens, cls, token)
  np.testing.assert_allclose(both, whole, rtol=1e-6)
  np.testing.assert_allclose(
    alignment.entangled_loss(None, tokens, cls, token),
    alignment.class_loss(cls, token),
  )
  np.testing.assert_allclose(
    alignment.entangled_loss(targets, tokens, None, None),
    alignment.target_loss(targets, tokens),
  )
