"""The mathematics of diffusion and distillation: pure functions, tensors in, tensors out."""
