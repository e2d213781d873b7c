"""The databases of these tests."""

from tests.databases import store, url

__all__ = ["store", "url"]
