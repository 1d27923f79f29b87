import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import selfboottok_jax as sbt
from selfboottok_jax import errors, inference, pretrained, trees
from selfboottok_jax.evaluation import evaluate, scores
from selfboottok_jax.models import sit
from tests import tiny

SIZE, CLASSES, BATCH = tiny.TOKENIZER['image_size'], 3, 8
SAMPLING = inference.Sampling(sampler='ode', num_steps=2, guidance_scale=1.5)


@pytest.fixture(scope='module')
def batches():
  images = np.random.default_rng(0).integers(
    0, 256, (2 * BATCH, SIZE, SIZE, 3), np.uint8
  )
  mask = np.arange(2 * BATCH) < 12
  return [
    {'image': images[s], 'label': np.zeros(BATCH, np.int32), 'mask': mask[s]}
    for s in (slice(BATCH), slice(BATCH, 2 * BATCH))
  ]


@pytest.fixture(scope='module')
def tokenizer():
  model = tiny.make_tokenizer()
  params = tiny.noise_for(model.init, jax.random.key(0), tiny.images(1))[
    'params'
  ]
  return inference.ImageTokenizer(model, tiny.awake(params), step=7)


@pytest.fixture(scope='module')
def generator(tokenizer):
  model = sit.SiT(
    num_tokens=tokenizer.num_tokens,
    token_dim=tokenizer.token_dim,
    num_classes=CLASSES,
    width=16,
    depth=1,
    heads=2,
  )
  codes = jnp.zeros((1, tokenizer.num_tokens, tokenizer.token_dim))
  params = tiny.noise_for(
    model.init, jax.random.key(0), codes, jnp.zeros(1), jnp.zeros(1, jnp.int32)
  )['params']
  latents = {name: jnp.ones(tokenizer.token_dim) for name in ('mean', 'std')}
  return inference.ImageGenerator(
    model,
    tiny.awake(params),
    latents,
    tokenizer,
    class_names=('a', 'b', 'c'),
    sampling=SAMPLING,
  )


def test_image_features_are_one_vector_per_image(batches):
  network = pretrained.load_network('hog', patch_size=4)
  features = evaluate.image_features(network)(jnp.asarray(batches[0]['image']))
  images = jnp.asarray(batches[0]['image'] / 127.5 - 1.0)
  seen = network(network.params, images)
  assert features.shape == (BATCH, network.dim)
  np.testing.assert_allclose(features, np.mean(seen.patches, axis=1), atol=1e-4)


def _samples(generator, labels, size):
  return np.concatenate(
    list(evaluate.sample_batches(generator, labels, size, seed=3))
  )


def test_samples_do_not_depend_on_the_batch_size(generator):
  balanced = evaluate.balanced_labels(7, CLASSES)
  np.testing.assert_array_equal(balanced, [0, 1, 2, 0, 1, 2, 0])
  wide, narrow = (_samples(generator, balanced, size) for size in (7, 4))
  assert wide.dtype == np.uint8
  assert wide.shape == (7, SIZE, SIZE, 3)
  np.testing.assert_array_equal(wide, narrow)
  others = _samples(generator, np.full(7, 2, np.int32), 7)
  same = [np.array_equal(a, b) for a, b in zip(others, wide, strict=True)]
  np.testing.assert_array_equal(same, balanced == 2)
  (some,) = evaluate.sample_batches(
    generator, balanced, 4, indices=np.array([5, 1]), seed=3
  )
  np.testing.assert_array_equal(some, wide[[5, 1]])


def _made(batches):
  """Images and mask of all batches, one after the other."""
  batches = list(batches)
  assert len({batch['image'].shape for batch in batches}) == 1
  return [
    np.concatenate([batch[key] for batch in batches])
    for key in ('image', 'mask')
  ]


def test_samples_to_score_come_in_padded_batches(generator):
  labels = np.array([2, 0, 1, 1, 0, 2, 2], np.int32)
  expected = _samples(generator, labels, 7)
  for batch_size in (7, 64):
    images, mask = _made(
      evaluate.samples_of(
        generator, labels, SAMPLING, batch_size=batch_size, seed=3
      )
    )
    np.testing.assert_array_equal(images[mask], expected)


def test_gaussian_codes_do_not_depend_on_the_batch_size(generator):
  small, large = (
    _made(evaluate.gaussian_codes_of(generator, 70, batch_size=size, seed=3))
    for size in (32, 128)
  )
  assert small[1].sum() == large[1].sum() == 70
  images = small[0][small[1]]
  np.testing.assert_array_equal(images, large[0][large[1]])
  assert len(np.unique(images, axis=0)) == 70


def test_weights_hash_tells_weights_apart(tokenizer):
  assert trees.weights_hash({}) == 'none'
  one = trees.weights_hash(tokenizer.params)
  assert one == trees.weights_hash(jax.tree.map(jnp.copy, tokenizer.params))
  assert one != trees.weights_hash(tiny.awake(tokenizer.params))


def test_scores_are_kept_in_a_workdir(tmp_path, store, bucket):
  made = [scores.Score('run', 'psnr', 20.0, {'description': 'of a test'})]
  for workdir in (tmp_path, f'{bucket}/run'):
    assert evaluate.read_scores(workdir) == []
    evaluate.add_scores(workdir, made)
    assert evaluate.read_scores(workdir) == made
  store.put(f'{bucket}/run/{evaluate.SCORES}', b'[{')
  with pytest.raises(errors.UserError, match='scores.json is damaged'):
    evaluate.read_scores(f'{bucket}/run')


def test_scores_of_earlier_versions_are_read(tmp_path):
  record = {
    'run': 'run',
    'metric': 'psnr',
    'value': 20.0,
    'higher_is_better': True,
    'protocol': 'in words',
  }
  (tmp_path / evaluate.SCORES).write_text(json.dumps([record]))
  assert evaluate.read_scores(tmp_path) == [
    scores.Score('run', 'psnr', 20.0, {'description': 'in words'})
  ]


def test_scores_elsewhere_are_found_and_the_latest_counts(tmp_path):
  old, new = ({'step': step} for step in (1, 2))
  evaluate.add_scores(tmp_path, [scores.Score('run', 'psnr', 20.0, old)])
  elsewhere = tmp_path / 'elsewhere.json'
  made = [
    # Of another version of the code: measured again, not another protocol.
    scores.Score('run', 'psnr', 21.0, old | {'version': '2'}),
    scores.Score('run', 'psnr', 22.0, new),
  ]
  evaluate.write_file(elsewhere, made)
  listed = [str(elsewhere), str(tmp_path / 'lost.json')]
  (tmp_path / evaluate.SCORE_FILES).write_text(json.dumps(listed))
  assert evaluate.read_scores(tmp_path) == made


@pytest.mark.parametrize('listed', ['5', '[5]', '{"a": 1}'])
def test_a_damaged_list_of_files_is_named(tmp_path, listed):
  (tmp_path / evaluate.SCORE_FILES).write_text(listed)
  with pytest.raises(errors.UserError, match=r'score_files.json is damaged'):
    evaluate.read_scores(tmp_path)


@pytest.mark.parametrize('value', ['null', '"x"'])
def test_a_score_without_a_number_is_damage(tmp_path, value):
  record = (
    f'{{"run": "r", "metric": "psnr", "value": {value}, "protocol": "p"}}'
  )
  (tmp_path / evaluate.SCORES).write_text(f'[{record}]')
  with pytest.raises(errors.UserError, match=r'scores.json is damaged'):
    evaluate.read_scores(tmp_path)


def test_the_digest_of_the_code_changes_with_a_line_and_a_name(tmp_path):
  def digest(name, text):
    package = tmp_path / name / text
    package.mkdir(parents=True)
    (package / f'{name}.py').write_text(text)
    return evaluate.code_digest(package)

  found = [digest('a', 'x = 1'), digest('a', 'x = 2'), digest('b', 'x = 1')]
  assert len(set(found)) == 3
  version = evaluate.here()['version']
  assert version == f'{sbt.__version__}+{evaluate.code_digest()}'
