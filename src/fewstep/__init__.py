"""Reproducible distillation of EDM diffusion teachers into few-step students."""
