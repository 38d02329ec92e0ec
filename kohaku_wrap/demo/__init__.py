"""The embedded world, a small database, tars and a tiny SDXL made on the spot, and the tour of it: `make epsilon`."""
