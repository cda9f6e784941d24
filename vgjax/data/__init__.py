"""Videos and captions to batches: `f(seed, step)`."""
