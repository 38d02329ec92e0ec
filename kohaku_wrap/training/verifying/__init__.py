"""What the ledger proves of a run."""
