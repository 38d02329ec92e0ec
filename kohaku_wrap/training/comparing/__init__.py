"""Whether a run is still what it was, and where it and its inputs lie."""
