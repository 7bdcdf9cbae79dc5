"""One pool: the core's decisions carried out on a slab and its control words."""
