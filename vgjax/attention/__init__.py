"""Attention without parameters: frozen dataclasses `attn(q, k, v, segments) -> o` that compose."""
