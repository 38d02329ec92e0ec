"""What is uploaded of a run: network, baked model, card, hashes."""
