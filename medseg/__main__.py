"""`python -m medseg`."""

from medseg.cli import process

if __name__ == "__main__":
    process()
