"""From ranked candidates to hard negatives. To add a filter: a function and a row in filters.py."""
