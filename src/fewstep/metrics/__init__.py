"""How far the samples are from real images: features, then a distance between two feature sets."""
