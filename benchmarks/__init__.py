"""unistream against the bare client of each broker, in one run, with the same guarantees, as ratios."""
