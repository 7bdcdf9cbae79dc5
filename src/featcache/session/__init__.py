"""A session over a mapped pool, the owner's or a client's: pin, wait, copy, borrow, pay, stage."""
