"""Exact top-k over one shard of the corpus, and the merge of the shards' top-ks."""
