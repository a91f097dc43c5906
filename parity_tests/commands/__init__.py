"""The command line's rooms: one file a command, `usage` for what they share."""
