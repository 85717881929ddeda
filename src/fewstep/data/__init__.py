"""Data: sources -> one LMDB -> batches keyed by nimg."""
