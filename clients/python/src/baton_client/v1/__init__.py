"""Stubs of baton.v1, generated from the contract."""
