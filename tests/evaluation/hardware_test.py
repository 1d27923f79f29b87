import pytest

from selfboottok_jax.evaluation import hardware


def test_float32_on_a_tpu_is_made_of_bfloat16_passes():
  chip = hardware.CHIPS['v5e']
  assert chip.rate('bfloat16') == chip.rate('float32') == 197e12
  assert chip.rate('float32 high') == pytest.approx(197e12 / 3)
  assert chip.rate('float32 highest') == pytest.approx(197e12 / 6)


def test_float32_on_a_gpu_is_tf32_unless_it_asks_for_more():
  chip = hardware.CHIPS['h100']
  assert chip.rate('float16') == chip.peak == 989e12
  assert chip.rate('float32') == chip.rate('float32 high') == 494.5e12
  assert chip.rate('float32 highest') == chip.rate('float64') == 67e12


@pytest.mark.parametrize('chip', hardware.CHIPS.values(), ids=lambda c: c.name)
def test_numbers_are_in_units_of_one_chip(chip):
  # Bytes and operations per second, not giga or tera of them.
  assert 1e14 < chip.peak < 3e15
  assert 2e10 < chip.usable <= chip.memory < 2.1e11 or chip.memory < 3e10
  # Operations per byte of all that is sold lie within an order of magnitude.
  assert 150 < chip.peak / chip.bandwidth < 600
  assert chip.link < chip.bandwidth
  assert chip.is_tpu == bool(chip.slices)


def test_every_kind_belongs_to_one_chip():
  kinds = [kind for chip in hardware.CHIPS.values() for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))
