"""One page about runs, drawn from their own records."""
