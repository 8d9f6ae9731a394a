"""Where the figures of a run go: metrics.jsonl and TensorBoard, and the line that a person watches."""
