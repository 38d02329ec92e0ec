"""Templates in layers, what each option decides, the check of both, and a run's files rendered from them."""
