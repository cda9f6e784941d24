"""State, step, optimizers, checkpoints, logs."""
