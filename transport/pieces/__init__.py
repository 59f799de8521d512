"""Models in pieces: what hosts of a pool get from each other, each named by the SHA-256 of its bytes."""
