"""Packed caches, their layers and pages, and the exact attention they are compared with."""
