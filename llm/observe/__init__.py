"""What the user sees of a run: the terminal, TensorBoard and other trackers, the report. All read metrics.jsonl."""
