import pathlib

import jax
import jax.numpy as jnp
import pytest

from selfboottok_jax import errors, pretrained
from selfboottok_jax.pretrained import (
  contract,
  released_generators,
  released_softvq,
)


def test_features_are_a_pytree_that_may_hold_anything():
  def see(x):
    return pretrained.Features(x, x[:, 0])

  x = jnp.ones((2, 3, 4))
  shapes = jax.eval_shape(see, x)
  assert shapes.patches.shape == (2, 3, 4)
  assert shapes.cls.shape == (2, 4)
  nothing = jax.tree.map(lambda _: None, see(x))
  assert nothing.patches is None
  assert jax.tree.leaves(pretrained.Features(x)) == [x]


def test_options_out_of_range_are_refused():
  contract.check_options('net', dtype='bfloat16', grid=1)
  contract.check_options('net', least=0, patch_size=0)
  with pytest.raises(errors.UserError, match='net: grid=0; wanted 1'):
    contract.check_options('net', grid=0)
  with pytest.raises(errors.UserError, match="'half'; wanted one of float32"):
    contract.check_options('net', dtype='half')


DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'networks.md'
PLACES = {
  **pretrained.published_networks(),
  **{name: place for name, place in released_softvq.RELEASED.items() if place},
  **{
    name: kind.published for name, kind in released_generators.RELEASED.items()
  },
}


def _rows():
  """By name, what the table of the docs says."""
  lines = DOCS.read_text().splitlines()
  table = [line for line in lines if line.startswith('| `')]
  rows = [line.strip('|').split('|') for line in table]
  return {cells[0].strip().strip('`'): cells[1:] for cells in rows}


def test_the_docs_list_every_network_and_no_other():
  assert _rows().keys() == PLACES.keys()


@pytest.mark.parametrize('name', PLACES)
def test_the_docs_say_what_the_code_says(name):
  place = PLACES[name]
  millions, licence, where, use = (cell.strip() for cell in _rows()[name])
  assert millions == f'{place.millions:.1f}M'
  assert licence == place.licence
  assert use == place.use
  for part in (place.hub or place.url).split(' and '):
    assert part in where
  for file in place.files:
    assert file in where


def test_a_place_is_the_hub_or_a_page():
  for name, place in PLACES.items():
    assert isinstance(place, contract.Published)
    assert bool(place.hub) != bool(place.url), name
    assert place.files, name
