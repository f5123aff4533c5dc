"""Ahead-of-time compilation for hardware that is not here, and what the compilers say about it."""
