"""Rotations, scales, codebooks, packing, trellises, window codes: arrays in, arrays out."""
