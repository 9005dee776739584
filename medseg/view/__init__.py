"""Pictures of a scan and its labels."""
