"""Ops on hidden states: one file per op, around one engine that makes the logits in chunks."""
