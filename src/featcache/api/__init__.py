"""The public objects: caches, clients, and the functions that make them."""
