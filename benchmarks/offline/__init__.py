"""What needs no clock: compile reports, machine code, counts, the time model."""
