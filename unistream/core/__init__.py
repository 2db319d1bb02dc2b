"""The rules room: decisions without I/O; time comes in as a number, nothing here reads a clock."""
