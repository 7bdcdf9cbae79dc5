"""Sessions: what owner and readers say to each other over the Unix socket."""
