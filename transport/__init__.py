"""Bytes between hosts: messages, codec, links. Knows no tensor library."""
