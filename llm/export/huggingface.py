"""A checkpoint as a Hugging Face folder: config, fp32 weights in safetensors, tokenizer. Needs no GPU and no engine.

The export of a run is held against the trained engine: both see the same token ids, and their logits must agree.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm.checkpoint.read import read_full_weights
from llm.checkpoint.store import CheckpointStore
from llm.config import S3Section
from llm.errors import ModelError
from llm.job import Job
from llm.model.families import field
from llm.parallel.zero import Engine
from llm.storage import is_s3, join, local_path, write_bytes
from llm.tokenizer import Tokenizer

MAX_FILE_BYTES = 5_000_000_000
PROBE_TOKENS = 64
# Largest |difference| of two logits that is still the same model computed in another order. Under bf16 and fp16 the engine's own
# rounding is of the order of 0.01 to 1 logit, so there the difference is reported and judged against 1.0 only.
LOGIT_TOLERANCE = {"fp32": 1e-4, "bf16": 1.0, "fp16": 1.0}


@dataclass(frozen=True)
class Export:
    uri: str
    max_logit_difference: float
    sample: str | None


def export_checkpoint(
    store: CheckpointStore, step: int, model_config: dict[str, Any], tokenizer: Tokenizer, uri: str, s3: S3Section
) -> None:
    """Writes the folder `uri` (local or s3://) from the checkpoint of `step`; an earlier export there is replaced as a whole."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        folder.mkdir()
        _write_weights(read_full_weights(store.open(step)), folder)
        settings = {key: value for key, value in model_config.items() if key != "model_type"}
        config = AutoConfig.for_model(model_config["model_type"], **settings)
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_config["model_type"]]]
        config.eos_token_id = tokenizer.eos_id
        config.dtype = "float32"
        config.save_pretrained(folder)
        for name, data in tokenizer.files.items():
            (folder / name).write_bytes(data)
        _publish(folder, uri, s3)


def _write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Writes tensors in files of at most MAX_FILE_BYTES (a larger tensor has one of its own) as they come: memory holds one file's."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0
    for name, tensor in weights:
        if held and held_bytes + tensor.nbytes > MAX_FILE_BYTES:
            save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(held))
            held, held_bytes = {}, 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
    files.append(list(held))
    if len(files) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _publish(folder: Path, uri: str, s3: S3Section) -> None:
    if is_s3(uri):
        for path in sorted(folder.iterdir()):
            write_bytes(join(uri, path.name), path.read_bytes(), s3)
        return
    target = Path(local_path(uri))
    beside = target.with_name(target.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder, beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def probe_ids(job: Job) -> Tensor:
    """Token ids (1, up to 64, at most a row) that export and engine are compared on: from all of the vocabulary, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, job.config.data.seq_len)
    return torch.randint(0, field(job.model_config, "vocab_size", job.tokenizer.vocab_size), (1, length), generator=generator)


@torch.no_grad()
def probe_logits(engine: Engine, job: Job) -> Tensor:
    """The engine's logits (1, tokens, vocab), fp32 on the CPU. All ranks must call it."""
    engine.deepspeed.eval()
    logits = engine.forward(input_ids=probe_ids(job).to(engine.device)).float().cpu()
    engine.deepspeed.train()
    return logits


@torch.no_grad()
def export_and_check(job: Job, store: CheckpointStore, step: int, engine_logits: Tensor, precision: str) -> Export:
    """Exports, loads the export as any user would, compares it with the engine, lets it write a sample. Rank 0 only.

    Raises ModelError where the two differ by more than LOGIT_TOLERANCE.
    """
    uri = join(job.run_uri, "export")
    with tempfile.TemporaryDirectory() as scratch:
        folder = join(scratch, "export") if is_s3(uri) else uri
        export_checkpoint(store, step, job.model_config, job.tokenizer, folder, job.config.s3)
        model = AutoModelForCausalLM.from_pretrained(local_path(folder), dtype=torch.float32, local_files_only=True).eval()
        if is_s3(uri):
            _publish(Path(folder), uri, job.config.s3)
    difference = float((model(input_ids=probe_ids(job)).logits - engine_logits).abs().max())
    if not difference <= LOGIT_TOLERANCE[precision]:
        raise ModelError(
            f"the export in {uri} does not compute what was trained: its logits differ from the engine's by up to {difference:.2g}, "
            f"more than {LOGIT_TOLERANCE[precision]:g} ({precision}). The checkpoint of step {step} is kept."
        )
    return Export(uri, difference, _sample(job, model))


def _sample(job: Job, model: Any) -> str | None:
    """Text that the model writes after `export.sample_prompt`, with fixed random numbers; None where no sample is asked for."""
    section, built = job.config.export, job.tokenizer.build(specials_in_text=True)
    prompt = built.encode(section.sample_prompt, add_special_tokens=False).ids or [job.tokenizer.eos_id]
    room = getattr(model.config, "max_position_embeddings", None) or job.config.data.seq_len
    new_tokens = min(section.sample_tokens, room - len(prompt))
    if new_tokens <= 0:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(job.config.run.seed)
        ids = torch.tensor([prompt])
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=job.tokenizer.eos_id,
        )
    return built.decode(written[0, len(prompt) :].tolist(), skip_special_tokens=True)
