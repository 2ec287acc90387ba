"""A vocabulary cut into shards: the exchange between ranks, and what follows from it."""
