"""The same API for code that has no event loop."""
