"""sentence-transformers' miner as a process of its own: MODEL ROWS POOL OUTPUT DTYPE, as mining_peers.py calls it."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives


def main(model_path: str, rows_path: str, pool_path: str, output: str, dtype: str) -> None:
    """Mines with the library's defaults but for the window, the number and the draw; one row a positive is its form."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = SentenceTransformer(model_path, device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    model.max_seq_length = 256  # it knows one length for queries and passages
    rows = [json.loads(line) for line in Path(rows_path).read_text().splitlines()]
    pool = [json.loads(line)["text"] for line in Path(pool_path).read_text().splitlines()]
    pairs = [(row["query"], positive) for row in rows for positive in row["pos"]]
    mined = mine_hard_negatives(
        Dataset.from_dict({"query": [query for query, _ in pairs], "pos": [positive for _, positive in pairs]}),
        model,
        corpus=pool,
        range_min=10,
        range_max=210,
        num_negatives=15,
        sampling_strategy="random",
        output_format="n-tuple",
        verbose=False,
    )
    mined.to_json(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
