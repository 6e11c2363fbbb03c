"""The commands: each reads arguments, calls the rooms below, maps faults to codes."""
