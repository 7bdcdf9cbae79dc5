"""Where bytes and control words live."""
