"""A model over text, once: everything that any fit needs, kept on disk."""
