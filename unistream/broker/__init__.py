"""The in-process broker: one state machine, its lock and its wake-ups."""
