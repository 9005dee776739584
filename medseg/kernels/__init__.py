"""Compiled loops on arrays: numpy and numba alone, no torch. Each module serves the one named after
its subject.
"""
