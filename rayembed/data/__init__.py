"""Files -> validated rows -> stores on disk -> planned batches of tokens.

To add a format of files: a function in readers.py that yields records, and a row in READERS. To add a column of
training rows: a field in rows.py and in ROWS of store.py.
"""
