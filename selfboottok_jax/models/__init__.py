"""Modules: parameters and nothing else; no config, no losses, no files.

Axis letters, here and in every shape annotation:

  b        batch
  h w c    image rows, columns, channels
  n        patches, in raster order
  k        tokens
  d        width of a transformer
  e        width of a code
  v        codebook size
  s        tokens in the segment that one codebook serves
"""
