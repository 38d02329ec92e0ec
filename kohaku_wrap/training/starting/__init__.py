"""What is decided before an attempt runs: made, made longer, branched, resumed."""
