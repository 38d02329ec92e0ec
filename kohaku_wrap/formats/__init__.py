"""One home for each file format and each table of names that several rooms read."""
