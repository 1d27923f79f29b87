"""`python -m tests.evaluation.published_page_test` writes the page anew."""

import pathlib

from selfboottok_jax.evaluation import published, published_page

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'results' / 'table1.md'


def test_the_page_is_made_of_the_data():
  assert PAGE.read_text() == published_page.page()


def test_cells_say_who_says_so():
  row = published.Row(
    name='r',
    system='s',
    paper={'rfid': 0.5, 'gfid': 2.0, 'gfid_guided': 1.0},
    source={'rfid': 0.5, 'gfid': 3.0, 'psnr': 20.0},
  )
  wanted = {
    'rfid': '0.50',
    'gfid': '**3.00** (paper: 2.00)',
    'gfid_guided': '1.00 ?',
    'psnr': '**20.00** (not in the paper)',
    'ssim': '–',
  }
  assert {key: published_page.cell(row, key) for key in wanted} == wanted


def test_systems_are_ranked():
  page = published_page.page()
  context = page[page.index('1.56 in context: ') :]
  names = ['FD-loss', 'RAEv2', 'MacTok', 'SelfBootTok', 'Real', 'FlatDINO']
  places = [context.index(f'| {name}') for name in names]
  assert places == sorted(places)


if __name__ == '__main__':
  PAGE.write_text(published_page.page())
