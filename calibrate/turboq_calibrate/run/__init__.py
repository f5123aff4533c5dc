"""How long work behaves: progress, checkpoints, peak memory."""
