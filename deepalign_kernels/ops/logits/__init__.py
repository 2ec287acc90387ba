"""Ops on logits: one file per op, with its schema, fake, autograd and form over shards."""
