"""What a run writes down about itself: sealed states, the ledger, metrics, and the proof from them."""
