"""Other hosts: who may come in, what is said over TCP, and the data plane that moves the bytes."""
