"""Train and sample text-to-video models in JAX."""
