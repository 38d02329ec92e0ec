"""What is decided before an attempt runs: a run made, made longer, branched or resumed, its caches, the command."""
