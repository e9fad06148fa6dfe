"""The models and schedulers of tools/parity_fixtures.py: between them they differ in every option."""

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM, EULER, HEUN, DPM = (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    DPMSolverMultistepScheduler,
)
D, C = "DownBlock2D", "CrossAttnDownBlock2D"
UP = {D: "UpBlock2D", C: "CrossAttnUpBlock2D"}

# One fixture each. tower = (hidden, intermediate, layers, heads, activation, max positions)
FIXTURES = {
    # The smallest: 2 levels, DDIM as SDXL's stock schedule. Tokenizers; an empty null prompt is encoded.
    "ddim_tiny": dict(
        seed=1, dtype="f16", batch=2, tokens=24, latents=(6, 8), image=(17, 12),
        unet=dict(block_out_channels=(8, 12), layers_per_block=1, down=(D, C), transformer_layers_per_block=1,
                  attention_head_dim=2, use_linear_projection=True, norm_num_groups=4, addition_time_embed_dim=8),
        vae=dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.13025),
        tower1=(8, 32, 2, 2, "quick_gelu", 24), tower2=(18, 48, 2, 3, "gelu", 24), projection=12,
        vocab="scene", force_zeros=False,
        scheduler=(DDIM, dict(SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              timestep_spacing="leading")),
        extras=("eta", "negative", "plain", "text", "grads", "schedulers"),
    ),
    # SDXL's own topology in small: 3 levels, plain level first, depths (1,2,3), 4-level VAE.
    "euler_sdxl_shape": dict(
        seed=2, dtype="f16", batch=2, tokens=16, latents=(6, 10), image=(41, 24),
        unet=dict(block_out_channels=(8, 8, 12), layers_per_block=2, down=(D, C, C),
                  transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 2, 3), use_linear_projection=True,
                  norm_num_groups=4, addition_time_embed_dim=16),
        vae=dict(block_out_channels=(4, 8, 8, 8), layers_per_block=2, norm_num_groups=4, scaling_factor=0.13025),
        tower1=(16, 48, 3, 4, "quick_gelu", 16), tower2=(20, 64, 4, 4, "gelu", 16), projection=32,
        vocab=99, legacy_eos=True, classic_keys="position_ids", force_zeros=True,
        scheduler=(EULER, dict(SD, steps_offset=1, timestep_spacing="leading", interpolation_type="linear")),
        extras=("plain",),
    ),
    # Attention in the first level, none in the last; conv projections; odd sizes; v-prediction; bf16.
    "euler_v_odd": dict(
        seed=3, dtype="bf16", batch=3, tokens=24, latents=(9, 7), image=(19, 23),
        unet=dict(block_out_channels=(8, 8, 12), layers_per_block=1, down=(C, C, D),
                  transformer_layers_per_block=(1, 2, 1), attention_head_dim=4, use_linear_projection=False,
                  norm_num_groups=4, addition_time_embed_dim=6),
        vae=dict(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=8, scaling_factor=0.18215),
        tower1=(12, 24, 1, 2, "gelu", 24), tower2=(20, 40, 2, 4, "gelu", 32), projection=10,
        vocab=104, eos_from_end=3, force_zeros=True,
        scheduler=(EULER, dict(SD, prediction_type="v_prediction", timestep_spacing="trailing")),
        extras=("rescale", "grads"),
    ),
    # Four levels, a tuple of layers, a level of depth 0, odd sizes all the way down; Heun.
    "heun_four_level": dict(
        seed=4, dtype="f16", batch=2, tokens=20, latents=(13, 11), image=(24, 33),
        unet=dict(block_out_channels=(8, 8, 12, 12), layers_per_block=(1, 2, 1, 2), down=(D, C, C, C),
                  transformer_layers_per_block=(0, 2, 1, 1), attention_head_dim=(1, 2, 2, 3),
                  use_linear_projection=True, norm_num_groups=4, addition_time_embed_dim=4),
        vae=dict(block_out_channels=(4, 8, 12), layers_per_block=2, norm_num_groups=4, scaling_factor=0.25,
                 force_upcast=False),
        tower1=(24, 48, 2, 3, "quick_gelu", 20), tower2=(16, 64, 3, 2, "gelu", 20), projection=20,
        vocab=120, eos_from_end=1, force_zeros=True,
        scheduler=(HEUN, dict(SD, timestep_spacing="leading", steps_offset=1)),
        extras=("negative",),
    ),
    # Depths (0,2,3); Heun on Karras sigmas (fractional timesteps); 77 tokens, f32.
    "heun_karras": dict(
        seed=5, dtype="f32", batch=2, tokens=77, latents=(8, 12), image=(16, 26),
        unet=dict(block_out_channels=(8, 8, 12), layers_per_block=1, down=(D, C, C),
                  transformer_layers_per_block=(0, 2, 3), attention_head_dim=(2, 1, 3), use_linear_projection=True,
                  norm_num_groups=4, addition_time_embed_dim=8),
        vae=dict(block_out_channels=(4, 8), layers_per_block=2, norm_num_groups=2, scaling_factor=0.13025),
        tower1=(16, 32, 2, 4, "quick_gelu", 77), tower2=(16, 32, 2, 2, "gelu", 77), projection=16,
        vocab=99, legacy_eos=True, force_zeros=True,
        scheduler=(HEUN, dict(SD, timestep_spacing="linspace", use_karras_sigmas=True)),
        extras=(),
    ),
    # DPM++ 2M, v-prediction, trailing; two attention levels; decoder without quant convolutions. Newer text keys.
    "dpm_v": dict(
        seed=6, dtype="f16", batch=2, tokens=24, latents=(5, 11), image=(21, 15), classic_keys=False,
        unet=dict(block_out_channels=(8, 16), layers_per_block=2, down=(C, C), transformer_layers_per_block=(2, 1),
                  attention_head_dim=(4, 2), use_linear_projection=False, norm_num_groups=4,
                  addition_time_embed_dim=10, norm_eps=1e-6),
        vae=dict(block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=0.5,
                 use_quant_conv=False, use_post_quant_conv=False, force_upcast=False),
        tower1=(16, 40, 2, 2, "quick_gelu", 24), tower2=(28, 56, 3, 4, "gelu", 24), projection=24,
        vocab="scene", force_zeros=True,
        scheduler=(DPM, dict(SD, prediction_type="v_prediction", timestep_spacing="trailing",
                             algorithm_type="dpmsolver++", solver_order=2)),
        extras=("text", "rescale"),
    ),
    # DPM++ 2M Karras, epsilon; a level of depth 2 between plain ones; linear betas.
    "dpm_karras": dict(
        seed=7, dtype="f16", batch=2, tokens=16, latents=(12, 9), image=(30, 20),
        unet=dict(block_out_channels=(8, 16, 16), layers_per_block=(2, 1, 1), down=(D, C, D),
                  transformer_layers_per_block=(1, 2, 1), attention_head_dim=(1, 4, 2), use_linear_projection=True,
                  norm_num_groups=8, addition_time_embed_dim=8),
        vae=dict(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=8, scaling_factor=0.13025),
        tower1=(16, 32, 4, 2, "quick_gelu", 16), tower2=(16, 32, 2, 4, "quick_gelu", 24), projection=8,
        vocab=110, eos_from_end=5, force_zeros=False,
        scheduler=(DPM, dict(beta_start=0.001, beta_end=0.012, beta_schedule="linear", use_karras_sigmas=True,
                             timestep_spacing="leading", steps_offset=1)),
        extras=("negative",),
    ),
    # 8 latent channels, 2-level VAE without quant_conv only; DDIM v-prediction trailing; newer text keys.
    "ddim_v_eight_channels": dict(
        seed=8, dtype="f16", batch=2, tokens=18, latents=(10, 6), image=(22, 14), latent_channels=8,
        classic_keys=False,
        unet=dict(block_out_channels=(16, 16), layers_per_block=1, down=(D, C), transformer_layers_per_block=(1, 2),
                  attention_head_dim=(2, 4), use_linear_projection=False, norm_num_groups=8,
                  addition_time_embed_dim=12),
        vae=dict(block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=8, scaling_factor=0.7,
                 use_quant_conv=False),
        tower1=(20, 40, 2, 5, "quick_gelu", 18), tower2=(24, 72, 2, 2, "gelu", 18), projection=14,
        vocab=100, eos_from_end=2, force_zeros=True,
        scheduler=(DDIM, dict(SD, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=True,
                              timestep_spacing="trailing")),
        extras=("rescale", "eta"),
    ),
    # All three levels with attention, one depth for all (an int), widths that differ, a latent size that needs
    # upsample_size in one direction only; Euler on Karras sigmas (fractional timesteps); sharded.
    "euler_all_attention": dict(
        seed=9, dtype="f16", batch=2, tokens=16, latents=(8, 6), image=(18, 25), shard="100KB",
        unet=dict(block_out_channels=(8, 12, 20), layers_per_block=1, down=(C, C, C), transformer_layers_per_block=1,
                  attention_head_dim=(2, 3, 5), use_linear_projection=True, norm_num_groups=4,
                  addition_time_embed_dim=8),
        vae=dict(block_out_channels=(12, 16), layers_per_block=2, norm_num_groups=4, scaling_factor=1.0,
                 force_upcast=False),
        tower1=(16, 24, 2, 2, "gelu", 77), tower2=(12, 48, 5, 3, "gelu", 16), projection=6,
        vocab=128, eos_from_end=1, force_zeros=True,
        scheduler=(EULER, dict(SD, timestep_spacing="linspace", use_karras_sigmas=True)),
        extras=("negative", "plain"),
    ),
}

# More schedulers on ddim_tiny's U-Net: (class, options, steps).
SCHEDULERS = {
    "ddim_trailing": (DDIM, dict(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"), 5),
    "ddim_linspace": (DDIM, dict(clip_sample=False, set_alpha_to_one=False, timestep_spacing="linspace"), 5),
    "ddim_leading_7": (DDIM, dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1), 7),
    "ddim_trailing_7": (DDIM, dict(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"), 7),
    "ddim_clip": (DDIM, dict(clip_sample=True, clip_sample_range=2.0, steps_offset=1), 5),
    "ddim_zero_snr_v": (DDIM, dict(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing",
                                   prediction_type="v_prediction"), 5),
    "euler_leading": (EULER, dict(steps_offset=1, timestep_spacing="leading"), 5),
    "euler_leading_7": (EULER, dict(steps_offset=1, timestep_spacing="leading"), 7),
    "euler_trailing_7": (EULER, dict(timestep_spacing="trailing"), 7),
    "euler_linspace": (EULER, dict(timestep_spacing="linspace"), 5),
    "euler_karras_leading": (EULER, dict(steps_offset=1, timestep_spacing="leading", use_karras_sigmas=True), 5),
    "euler_karras_trailing": (EULER, dict(timestep_spacing="trailing", use_karras_sigmas=True), 5),
    "euler_log_linear": (EULER, dict(timestep_spacing="linspace", interpolation_type="log_linear"), 5),
    "euler_sigma_min": (EULER, dict(timestep_spacing="leading", final_sigmas_type="sigma_min"), 5),
    "euler_zero_snr_v": (EULER, dict(timestep_spacing="trailing", rescale_betas_zero_snr=True,
                                     prediction_type="v_prediction"), 5),
    "heun_trailing": (HEUN, dict(timestep_spacing="trailing"), 5),
    "heun_linspace": (HEUN, dict(timestep_spacing="linspace"), 5),
    "heun_karras_leading": (HEUN, dict(steps_offset=1, timestep_spacing="leading", use_karras_sigmas=True), 5),
    "heun_v_trailing": (HEUN, dict(timestep_spacing="trailing", prediction_type="v_prediction"), 5),
    "dpm_leading": (DPM, dict(steps_offset=1, timestep_spacing="leading"), 5),
    "dpm_linspace": (DPM, dict(timestep_spacing="linspace"), 5),
    "dpm_trailing_7": (DPM, dict(timestep_spacing="trailing"), 7),
    "dpm_karras_20": (DPM, dict(timestep_spacing="linspace", use_karras_sigmas=True), 20),
    "dpm_heun_sigma_min": (DPM, dict(timestep_spacing="linspace", solver_type="heun",
                                     final_sigmas_type="sigma_min"), 5),
    "dpm_first_order": (DPM, dict(timestep_spacing="linspace", solver_order=1), 5),
}
