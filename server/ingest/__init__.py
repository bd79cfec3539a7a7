"""Uploaded files -> rows: one module a file format, one for what a row must be, one that does the whole.

Knows no HTTP and no database.
"""
