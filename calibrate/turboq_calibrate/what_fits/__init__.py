"""Memory of a cache for people: geometries read from files, text, pictures."""
