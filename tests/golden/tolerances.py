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
  ('tok04_*', 'out_loss_global'): (5e-7, None, 2e-5),
  ('tok04_*', 'out_loss*'): (5e-8, None, 2e-5),
  ('tok04_*', 'out_projected'): (5e-6, None, 5e-6),
  ('tok04_*', 'out_grad_tokens'): (1e-8, None, 5e-6),
  ('tok04_*', 'out_grad_tokens_*'): (2e-8, None, 5e-6),
  ('tok04_*', 'out_grad/*.weight'): (5e-9, None, 5e-6),
  ('tok04_*', 'out_grad/*.bias'): (5e-8, None, 5e-6),
  ('tok05_gan_*', 'out_hinge_g'): (1e-5, None, 2e-5),
  ('tok05_gan_*', 'out_ema_*'): (2e-8, None, 2e-5),
  ('tok05_gan_*', 'out_grad_*'): (1e-8, None, 5e-6),
  ('tok05_gan_*', '*'): (5e-5, None, 2e-5),
  ('tok03_*', 'out_features_256'): (2e-5, None, 5e-6),
  ('tok03_*', 'out_pos_embed_44x44_every97'): (5e-6, None, 2e-5),
  ('tok03_*', '*'): (1e-6, None, 5e-6),
  ('tok08_*', 'out_last_hidden_state*'): (1e-4, None, 2e-5),
  ('tok08_*', '*'): (5e-5, None, 2e-5),
  ('tok07_*', 'out_kl'): (5e-3, None, 2e-5),
  ('tok07_*', 'out_recon_from_mean'): (5e-4, None, 1e-4),
  ('tok07_*', 'out_recon_from_latent'): (2e-4, None, 5e-5),
  ('tok07_*', '*'): (5e-5, None, 2e-5),
  # A converged float64 solve; float32 is judged by its cost alone.
  ('tok09_*', 'float32_transport_cost'): (None, 1e-4, None),
  ('tok09_*', 'out_plan'): (5e-9, None, 1e-6),
  ('tok09_*', 'out_grad_*'): (5e-9, None, 1e-6),
  ('tok09_*', 'out_sum_plogp_minus_p'): (2e-5, None, 1e-6),
  ('tok09_*', 'out_objective'): (2e-5, None, 1e-6),
  ('tok09_*', 'out_cost'): (5e-6, None, 1e-6),
  ('tok09_*', 'out_marginal_l1_error_at_50_iters'): (1e-9, 1e-6, None),
  ('tok09_*', '*'): (2e-6, None, 1e-6),
  ('tok06_lpips_vgg_*', 'out_distance'): (5e-6, None, 2e-5),
  ('tok06_lpips_vgg_*', 'out_grad_target'): (5e-6, None, 1e-3),
  ('tok06_lpips_vgg_*', 'out_feat_*'): (2e-5, None, 2e-5),
  ('tok06_lpips_*', 'out_per_layer'): (5e-7, None, 5e-6),
  ('tok06_lpips_*', 'out_distance'): (2e-6, None, 2e-5),
  ('tok06_lpips_*', 'out_grad_target'): (2e-6, None, 1e-3),
  ('tok10_*', 'out_recon_u8'): (0.0, 0.0, None),
  ('tok10_*', 'out_psnr_*'): (1e-3, None, 1e-4),
  ('tok10_*', 'out_ssim_*'): (2e-5, None, 5e-5),
  # The recorded mean is of float32 sums.
  ('fid_features', 'out.*.mu?'): (1e-6, 1e-5, None),
  ('adm_frechet', 'out.*.mu?'): (1e-6, 1e-5, None),
  ('fid_features', 'out.*.sigma?'): (1e-12, 1e-9, None),
  ('adm_frechet', 'out.*.sigma?'): (1e-12, 1e-9, None),
  # The recorded value hangs on the round-off of zero eigenvalues.
  ('fid_features', 'out.rank_deficient.*'): (1e-3, None, None),
  ('fid_features', 'out.identical.*'): (1e-3, None, None),
  ('adm_frechet', 'out.rank_deficient.*'): (1e-3, None, None),
  ('adm_frechet', 'out.identical.*'): (1e-3, None, None),
  ('fid_features', 'out.*'): (None, 1e-6, None),
  ('adm_frechet', 'out.*'): (None, 1e-5, None),
  # Networks of the generator and their tables.
  ('softvq_sit1d*', '*'): (1e-5, 1e-5, None),
  ('tables', 'out.temb_big'): (1e-4, None, None),
  ('tables', '*'): (1e-6, None, None),
  # SiT's paths: 1 / alpha and 1 / sigma^2 amplify near the ends.
  ('sit_transport', 'out.*_velocity'): (1e-5, 1e-4, None),
  ('sit_transport', 'out.*.d_sigma'): (1e-5, 1e-4, None),
  ('sit_transport', 'out.*.ut'): (1e-5, 1e-4, None),
  ('sit_transport', '*'): (1e-5, 1e-5, None),
  ('reg_convention', 'out.*.score*'): (1e-5, 1e-4, None),
  ('reg_convention', '*'): (1e-5, 1e-5, None),
  # Samplers with a field in closed form, in float64 and in float32.
  ('sampler_repa', '*calls_batch'): (0.0, 0.0, None),
  ('sampler_repa', '*'): (1e-11, 1e-11, None),
  ('sampler_repa.float32', 'sde250'): (5e-4, 1e-4, None),
  ('sampler_repa.float32', '*'): (1e-4, 1e-4, None),
  ('sampler_softvq_model', '*'): (1e-4, 1e-4, None),
  ('sampler_sit', '*'): (1e-4, 1e-4, None),
}
