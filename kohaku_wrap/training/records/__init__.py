"""What a run writes down about itself: lock, attempts, sealed states, ledger, metrics, networks and pictures."""
