"""Codecs and arrays of learned transforms at one size."""

from turboq.codecs.fit_transform import TransformOptions, arrays_of, fit_heads, head_rates


def transform_at(seen, bits_per_vector, options=None, *, fits=None):
    """Every KV head's own best `transform` within so many stored bits: (codec, arrays)."""
    options = options or TransformOptions()
    fits = fits or fit_heads(seen, options)
    out = []
    for fit, table, x in zip(fits, head_rates(fits, options), seen.x, strict=True):
        segments = table.segments[table.at(bits_per_vector - options.overhead(seen.dim))]
        codec = options.codec(seen.dim, segments)
        out.append((codec, arrays_of(codec, fit, x)))
    return out
