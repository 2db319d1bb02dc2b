"""Other libraries on the same brokers and the same work; their packages come with the dependency group `peers`."""
