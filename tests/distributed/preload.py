"""Imported once, in the process that the test ranks are forked from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402

import llm.train.loop  # noqa: E402, F401

torch.set_num_threads(1)
