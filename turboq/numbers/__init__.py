"""Rotations, scales, codebooks, packing, trellises: arrays in, arrays out."""
