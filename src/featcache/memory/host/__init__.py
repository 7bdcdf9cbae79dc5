"""Host memory: memfd slabs, and the memory that this process may have."""
