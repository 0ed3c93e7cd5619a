"""A warm process: it keeps an index and its encoder loaded and answers what short-lived processes ask it.

Asking must cost next to nothing, so all but `server.py` is of the standard library's lighter parts.
"""
