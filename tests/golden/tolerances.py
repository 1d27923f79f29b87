"""The one table of tolerances for recorded numbers.

Rows are (fixture glob, array glob): (atol, rtol, relative L2); None where a
bound is not used. The first row that matches decides, so exceptions stand
above the general rows.
"""

TABLE: dict[
  tuple[str, str], tuple[float | None, float | None, float | None]
] = {
  ('tok01_*', 'out_grad_z_entropy_only'): (5e-8, None, 5e-5),
  ('tok01_*', 'out_grad_*'): (1e-5, None, 5e-6),
  ('tok01_*', 'out_indices'): (0.0, 0.0, None),
  ('tok01_*', 'out_entropy_loss'): (1e-6, None, 2e-5),
  ('tok01_*', 'out_sample_entropy'): (1e-5, None, 2e-5),
  ('tok01_*', 'out_avg_entropy'): (1e-4, None, 2e-5),
  ('tok01_*', 'out_scalar'): (1e-4, None, 2e-5),
  ('tok01_*', 'out_max_probs'): (2e-5, None, 2e-5),
  ('tok01_*', 'out_zq_z_cos'): (2e-5, None, 2e-5),
  ('tok01_*', '*'): (5e-6, None, 5e-6),
}
