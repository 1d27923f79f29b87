"""Neural networks as flax modules.

They hold parameters and nothing else: they know no configuration file, no loss
and no disk.

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
