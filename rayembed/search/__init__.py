"""Top-k over some passages, exact or approximate, and the merge of top-ks. To add a backend: see backends.py."""
