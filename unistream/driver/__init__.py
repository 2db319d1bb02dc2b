"""The contract room: everything an adapter imports, and nothing that an application needs."""
