"""Imports the training libraries in a thread, from the moment a worker process starts.

Ray needs some seconds to place a worker, set up its data and call it; torch, DeepSpeed and transformers take as long to import. Python's
import lock makes `import torch` elsewhere wait for this thread, so nothing is imported twice or half.
"""

from __future__ import annotations

import importlib
from threading import Thread

# In the order in which a worker needs them; the last two bring in what a causal language model is built from.
MODULES = ("torch", "deepspeed", "llm.train.loop", "transformers.models.llama.modeling_llama")


def begin() -> None:
    """Ray's `worker_process_setup_hook`: returns at once."""
    Thread(target=_import, name="preload", daemon=True).start()


def _import() -> None:
    for name in MODULES:
        importlib.import_module(name)
