"""One training worker's view; knows torch.distributed, not Ray. Read loop.py first."""
