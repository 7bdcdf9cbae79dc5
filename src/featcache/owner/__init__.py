"""An owner: pools made reachable, sessions admitted and settled, their requests handled."""
