"""Label maps against references: pairs, metrics, statistics, a report, and methods against each other."""
