"""Attention that reads the packed KV cache."""
