"""Images from denoisers: batches of seeds, and whole rows of the results table."""
