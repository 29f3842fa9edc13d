"""Imported once, in the process that the test ranks are forked from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import deepspeed  # noqa: F401
import torch
import transformers.models.auto.modeling_auto
import transformers.models.llama.modeling_llama  # noqa: F401 - the tests' model; transformers would load it in every rank

import llm.train.loop  # noqa: F401

torch.set_num_threads(1)
