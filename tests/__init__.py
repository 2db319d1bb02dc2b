"""The tests; a package, so that no stray package of that name shadows it."""
