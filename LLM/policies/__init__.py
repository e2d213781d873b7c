"""Policies: plain objects that do no I/O and are handed a clock."""
