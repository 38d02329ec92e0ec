"""Launch, supervision, exact resume, states and the ledger of a run."""
