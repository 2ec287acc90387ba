"""The `deepalign` command: finds the command asked for and reads its options."""
