"""The wire between owner and sessions: messages, frames and descriptors, peers and their deaths."""
