"""Tables of posts of every published edition as arrays: the only room with SQL."""
