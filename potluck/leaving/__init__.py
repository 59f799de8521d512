"""Removing what Potluck keeps on this host, and nothing else."""
