"""What a merge computes: exact sums rounded once, functions over tensors, deltas of networks."""
