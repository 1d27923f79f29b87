import dataclasses
import json

import pytest

from selfboottok_jax.evaluation import cost, flops, hardware, hlo, roofline
from selfboottok_jax.stages import forecast, topology

GIB = 2**30
KEYS = {
  *('chips', 'bytes_per_chip', 'chip_bytes', 'flops_per_step'),
  *('collective_bytes', 'roofline_seconds', 'mfu_bound', 'hours'),
}
# What a program needs beside the batch, and for each image.
FIXED, IMAGE = 2 * GIB, GIB // 64


def _program(batch, operations=1e12):
  memory = forecast.Memory(FIXED, 0, 0, batch * IMAGE)
  work = [roofline.Work('', {'bfloat16': operations}, 0)]
  moved = [hlo.Collective('all-gather', ('fsdp',), 3, 2e9)]
  return forecast.Program(batch, memory, work, moved, 60.0)


def _forecast(name='v5e:4x4', batch=256, **changes):
  where = topology.parse(name)
  # Half of the operations of all chips are the model's, per image.
  model = 0.5 * where.num_devices * 1e12 / batch
  rows = [
    cost.Row('net', 10, True, flops.Flops(model / 4, model / 4, model)),
    cost.Row('teacher', 20, False, flops.Flops(model / 2)),
    cost.Row('losses', 0, None, flops.Flops()),
  ]
  kinds = {'bfloat16': 2 * model * batch}
  trace = forecast.Trace(
    rows=rows,
    types={'net': kinds, 'teacher': {}, flops.OTHER: {}},
    phases={0: 0.25, 100: 1.0},
    assumed=['a tokenizer'],
    mesh={'data': 1, 'fsdp': where.num_devices},
    least_moved=1e9,
  )
  return forecast.Forecast(
    where=where,
    batch_size=batch,
    steps=400,
    trace=trace,
    program=_program(batch),
    other=_program(batch // 2),
    compiled=not where.emulated,
    **changes,
  )


def test_the_bound_and_the_hours_follow_from_the_roofline():
  found = _forecast()
  chip = hardware.CHIPS['v5e']
  # 2 GB over links of 200 GB/s take longer than 1 TFLOP at 197.
  assert found.roofline.seconds == pytest.approx(2e9 / 200e9)
  assert found.roofline.bound_by == 'links'
  assert found.mfu_bound == pytest.approx(0.5e12 / chip.peak / 0.01)
  # The first 100 of 400 steps take a quarter of the time.
  assert found.hours == pytest.approx((25 + 300) * 0.01 / 3600)
  values = found.to_dict()
  assert values.keys() >= KEYS
  assert values['chip_hours'] == pytest.approx(16 * values['hours'])
  assert values['flops_per_step'] == pytest.approx(16 * 1.0e12)
  assert values['model_flops_per_step'] == pytest.approx(16 * 0.5e12)
  assert values['collective_bytes'] == 2e9
  assert values['chip_bytes'] == 16 * GIB
  json.dumps(values, allow_nan=False)


def test_the_least_recomputation_that_fits_is_proposed():
  # v5e has 16 GiB; the program needs 2 + 4, of which it keeps 1.
  kept = {'none': 20.0 * GIB, 'dots': 8.0 * GIB, 'block': 1.0 * GIB}
  found = _forecast(kept=kept, remat='block')
  assert found.needs == {'none': 25 * GIB, 'dots': 13 * GIB, 'block': 6 * GIB}
  values = found.to_dict()
  assert values['proposed_remat'] == found.proposed_remat == 'dots'
  assert values['bytes_by_remat']['dots'] == 13 * GIB
  assert '--config.model.remat=dots' in found.to_text()
  best = dataclasses.replace(
    found, remat='dots', kept=kept | {'dots': 1.0 * GIB}
  )
  assert 'dots, as it is, computes least again and fits' in best.to_text()
  large = dataclasses.replace(found, kept=dict.fromkeys(kept, 20.0 * GIB))
  large = dataclasses.replace(
    large, program=dataclasses.replace(large.program, memory=_huge())
  )
  assert large.proposed_remat == ''
  assert 'none of them fits' in large.to_text()
  assert _forecast().needs == {}


def _huge():
  return forecast.Memory(FIXED, 0, 0, 40 * GIB)


def test_what_tiles_waste_is_shown():
  found = _forecast()
  trace = dataclasses.replace(
    found.trace,
    padded={'net': 2 * 14e12, 'teacher': 0.0, flops.OTHER: 0.0},
  )
  shown = dataclasses.replace(found, trace=trace)
  net, teacher, losses = shown.to_dict()['components']
  # 1.5 x 8e12 operations of numbers: forward, backward, recomputed.
  assert net['tiles_filled'] == pytest.approx(12e12 / 28e12)
  assert teacher['tiles_filled'] is losses['tiles_filled'] is None
  text = shown.to_text()
  assert 'tiles of 128' in text
  assert '43%' in text
  assert 'tiles' not in found.to_text()


def test_a_refusal_without_numbers_proposes_nothing():
  kept = {'none': 3.0 * GIB, 'block': 1.0 * GIB}
  found = _forecast(kept=kept, remat='none', refused='no room')
  # It fits by the sum, but not by the compiler.
  assert found.proposed_remat == 'block'
  nothing = dataclasses.replace(
    found,
    program=dataclasses.replace(
      found.program, memory=forecast.Memory(FIXED, 0, 0, 0)
    ),
  )
  assert nothing.needs == {}
  assert 'by model.remat' not in nothing.to_text()


def test_a_short_training_never_leaves_its_first_phase():
  found = dataclasses.replace(_forecast(), steps=40)
  assert found.hours == pytest.approx(40 * 0.25 * 0.01 / 3600)


def test_the_largest_batch_is_on_the_line_through_two_programs():
  found = _forecast()
  assert found.program.memory.total == FIXED + 256 * IMAGE
  assert found.fits
  room = (15.75 * GIB - FIXED) // IMAGE
  assert found.largest_batch == room // 16 * 16
  assert dataclasses.replace(found, other=None).largest_batch is None


def test_what_the_compiler_refuses_says_how_much_it_wanted():
  words = 'the total memory required for HLO temporaries (30.50G) exceeds it'
  found = _forecast(refused=words)
  memory = forecast.Memory(FIXED, 0, 0, 30.5 * GIB)
  program = dataclasses.replace(found.program, memory=memory)
  found = dataclasses.replace(found, program=program, other=None)
  assert not found.fits
  # Intermediate values are taken to shrink with the batch.
  assert found.largest_batch == int(13.75 / 30.5 * 256) // 16 * 16
  assert 'DOES NOT FIT; the compiler says' in found.to_text()
  # A smaller one that was compiled knows better.
  memory = forecast.Memory(FIXED, 0, 0, 1.0 * GIB)
  smaller = dataclasses.replace(found.program, memory=memory, batch_size=64)
  better = dataclasses.replace(found, other=smaller)
  assert better.largest_batch == int(13.75 * 64) // 16 * 16
  assert 'about 880, ' in better.to_text()
  assert 'in proportion from batch 64' in better.to_text()


def test_a_chip_of_two_devices_has_twice_their_numbers():
  found = _forecast('tpu7x:2x2x1')
  values = found.to_dict()
  assert values['chips'] == 4
  assert values['collective_bytes'] == 4e9
  assert values['flops_per_chip'] == {'bfloat16': 2e12}
  assert values['roofline_seconds'] == pytest.approx(4e9 / 600e9)


def test_the_text_tells_what_the_numbers_are():
  text = _forecast().to_text()
  for words in (
    '16 x v5e (v5e:4x4, mesh: data 1 x fsdp 16), batch 256',
    'assumed: a tokenizer',
    'memory per chip: 6.0 GiB of 16.0 GiB',
    'programs of batch 256 and 128',
    'that is 2.00 times the least, 1,000 MB',
    'roofline: 10 ms a step, bound by links',
    'MFU bound: 25.4% of 197 TFLOP/s, dense bfloat16; frozen networks are 50%',
    'as compiled',
  ):
    assert words in text
  text = _forecast('h100:8').to_text()
  assert 'partitioned for as many devices' in text
  assert 'as compiled for CPU devices' in text
