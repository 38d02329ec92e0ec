"""One folder an engine, and what both do."""
