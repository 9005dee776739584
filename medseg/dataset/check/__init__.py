"""Is this data fit to train on? Cases one by one, against each other, and a corrected copy."""
