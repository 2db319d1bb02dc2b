"""The catalogue: one module per group of cases, each case one promise of the contract seen from outside."""
