"""Other people's checkpoints: read safely, under their own state-dict names."""
