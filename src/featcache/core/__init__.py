"""What is decided: synchronous and pure, with no torch, no I/O and no clock of its own."""
