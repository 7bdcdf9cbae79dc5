"""CUDA memory: the driver's calls, backings, streams, mappings and slabs."""
