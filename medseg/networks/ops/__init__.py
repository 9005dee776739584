"""Torch operators on the compiled loops of `medseg.kernels`. Each module serves the one named after
its subject.
"""
