"""A type checker finds a misspelt setting of the public surface."""

import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SNIPPET = """
import numpy as np
import selfboottok_jax as sbt

tok = sbt.load_tokenizer('tok')
tok.decode(tok.encode(np.zeros((1, 8, 8, 3), np.uint8)), num_groups=1)
gen = sbt.load_generator('run', tokenizer=tok)
gen.sample(np.zeros(4, np.int32), guidance_scale=2.0)
gen.sample(np.zeros(4, np.int32), guidance_scal=2.0)
"""


@pytest.mark.slow
def test_a_misspelt_setting_is_an_error(tmp_path):
  snippet = tmp_path / 'snippet.py'
  snippet.write_text(SNIPPET)
  found = subprocess.run(
    [
      *(sys.executable, '-m', 'mypy', '--ignore-missing-imports'),
      *(f'--cache-dir={tmp_path}', '--follow-imports=silent', snippet),
    ],
    cwd=ROOT,
    check=False,
    capture_output=True,
    text=True,
  )
  errors = [line for line in found.stdout.splitlines() if ': error' in line]
  assert len(errors) == 1, found
  assert 'snippet.py:9: error' in errors[0]
  assert 'guidance_scal' in errors[0]
