"""From what was observed to codecs and their arrays."""
