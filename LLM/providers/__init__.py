"""Providers: pure functions between calls and the wire."""
