"""Inception score, precision and recall, and all of ADM's evaluator at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from selfboottok_jax.evaluation import (
  inception_score,
  precision_recall,
  references,
  set_features,
  set_scores,
)
from selfboottok_jax.pretrained import inception
from tests.evaluation import sets
from tests.golden import fixtures, records

pytestmark = pytest.mark.golden


def test_inception_score():
  left_out = {'out.torchmetrics.*': 'parts of another size, in float32'}
  with records.opened('isc_logits', left_out) as record:
    logits = record.arrays['in.logits']
    order = inception_score.shuffle(len(logits))
    record.check('out.permutation_2020', order)
    for count in (1, 3, 10):
      for shuffled, rows in ((1, logits[order]), (0, logits)):
        record.check(
          f'out.torch_fidelity.splits{count}.shuffle{shuffled}',
          inception_score.score_in_parts(rows, count),
        )
    # One part is the same in every convention.
    np.testing.assert_allclose(
      inception_score.score_in_parts_of(logits),
      record.arrays['out.torch_fidelity.splits1.shuffle0'][0],
      rtol=1e-5,
    )


def test_neighbours_of_torch_fidelity():
  left_out = {'out.kid_poly_mmd2': 'no score of ours'}
  with records.opened('prc_features', left_out) as record:
    made, real = record.arrays['in.generated'], record.arrays['in.real']
    for k in (1, 3, 5):
      found = precision_recall.precision_recall(real, made, k)
      record.check(f'out.k{k}', found)
    for name, features in (('generated', made), ('real', real)):
      radii = np.sqrt(precision_recall.radii(features))
      record.check(f'out.kth_dist_{name}_k3', radii)


def test_neighbours_of_adm():
  left_out = {
    'out.*.dist_block': 'inner to the search',
    'out.*.evaluate_*': 'the same share, and scores that are none of ours',
  }
  with records.opened('adm_precision_recall', left_out) as record:
    real, made = record.arrays['in.ref'], record.arrays['in.sample']
    found = {
      k: precision_recall.precision_recall(real, made, k)
      for k in record.meta['nhoods']
    }
    multi = np.transpose([found[k] for k in record.meta['nhoods']])
    for kind, scale in (('fp16', 1.0), ('fp32', record.meta['scale'])):
      for name, features in (('ref', real), ('sample', made)):
        radii = precision_recall.radii(features)[:, None] * scale**2
        record.check(f'out.{kind}.radii_{name}', radii)
      record.check(f'out.{kind}.precision_recall', found[3])
      record.check(f'out.{kind}.precision_recall_batched', found[3])
      record.check(f'out.{kind}.precision_recall_multi', multi)
    record.check('out.exact_f64_precision_recall', found[3])


class StandIn(set_features.SetNetwork):
  """The recorded graph behind the resize that is Inception's here."""

  def features(self, params, images):
    x = self.network.prepare(images)

    def convolve(x, name, stride):
      kernel, bias = params[f'{name}_kernel'], params[f'{name}_bias']
      y = jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        precision=jax.lax.Precision.HIGHEST,
      )
      return jax.nn.relu(y + bias[None, None, None])

    spatial = convolve(x, 'spatial', 17)[..., :7]
    pool = convolve(x, 'pool', 23).mean(axis=(1, 2))
    pool = jax.nn.relu(
      jnp.dot(pool, params['pool_proj'][0, 0], precision='highest')
    )
    return {
      set_features.POOL: pool,
      set_features.SPATIAL: spatial.reshape(len(spatial), -1),
      set_features.LOGITS: jnp.dot(
        pool, params['softmax_w'], precision='highest'
      ),
    }


def test_adm_end_to_end(tmp_path):
  left_out = {
    'out.*.radii': 'float16',
    'out.fid': 'the root of a singular product',
    'out.sfid': 'the root of a singular product',
  }
  with records.opened('adm_end_to_end', left_out) as record:
    path = fixtures.path('generator', record.name)
    with np.load(path.with_name(f'{record.name}.weights.npz')) as file:
      weights = dict(file)
    network = StandIn(inception.Inception(params=weights), is_official=True)
    metrics = ('fid', 'sfid', 'is', 'precision', 'recall')
    measurement = set_scores.SetMeasurement([network], metrics, sets.mesh(2))
    real, made = record.arrays['in.ref'], record.arrays['in.sample']
    rows = {}
    for name, pictures in (('ref', real), ('sample', made)):
      whole = dataclasses.replace(
        measurement.wanted,
        kept=tuple(network.key(k) for k in ('pool', 'spatial', 'logits')),
      )
      collected = set_features.SetFeatures(whole)
      for batch in sets.batches(pictures, record.meta['batch_size']):
        collected.add(batch)
      collected.finish()
      rows[name] = collected
      for kind in ('pool', 'spatial'):
        found = collected.features(network.key(kind))
        record.check(f'out.{name}.{kind}', found)
    logits = rows['sample'].features(network.key('logits'))
    share = scipy.special.softmax(logits[:4].astype(np.float64), axis=1)
    record.check('out.softmax_sample_first4', share)
    for size in record.meta['is_split_sizes']:
      value = inception_score.score_in_parts_of(logits, size)
      record.check(f'out.inception_score_split{size}', value)
    for batch in sets.batches(made, 16):
      measurement.add(batch)
    np.savez(tmp_path / 'ref.npz', arr_0=real)
    reference = references.open_reference(
      tmp_path / 'ref.npz', measurement.wanted, image_size=48, cache=tmp_path
    )
    scores = {m: value for m, value, _ in measurement.finish(reference)}
    record.check('out.fid_nuclear', scores['fid'])
    record.check('out.sfid_nuclear', scores['sfid'])
    record.check('out.inception_score_split5000', scores['is'])
    both = [scores['precision'], scores['recall']]
    record.check('out.precision_recall', both)
