"""What is measured: ops, shapes, inputs and the work they need at least."""
