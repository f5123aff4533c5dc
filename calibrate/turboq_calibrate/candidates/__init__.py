"""What every (layer, KV head, K or V) may be stored as."""
