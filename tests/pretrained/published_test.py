import pathlib

import pytest

from selfboottok_jax import pretrained
from selfboottok_jax.pretrained import published, released_generators, softvq

DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'networks.md'
PLACES = {
  **pretrained.published_networks(),
  **{name: place for name, place in softvq.RELEASED.items() if place},
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
    assert isinstance(place, published.Published)
    assert bool(place.hub) != bool(place.url), name
    assert place.files, name
