"""One suite that judges every backend by the same rules: what a user was promised, observed from outside."""
