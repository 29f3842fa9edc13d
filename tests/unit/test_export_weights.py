"""Exported weights: files of bounded size, written as the tensors come, which transformers and safetensors read as one model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from llm.export import huggingface


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (1000, 3)])
def test_weights_come_in_files_of_bounded_size(tmp_path, monkeypatch, limit, files):
    monkeypatch.setattr(huggingface, "MAX_FILE_BYTES", limit)
    weights = {f"w{i}": torch.randn(size) for i, size in enumerate((100, 100, 300, 50, 200))}
    huggingface._write_weights(iter(weights.items()), tmp_path)
    written = sorted(tmp_path.glob("*.safetensors"))
    assert len(written) == files
    if files == 1:
        assert written[0].name == "model.safetensors"
        found = load_file(written[0])
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 750 * 4
        found = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    assert {path.name for path in tmp_path.iterdir()} - {p.name for p in written} <= {"model.safetensors.index.json"}
    assert found.keys() == weights.keys()
    assert all(found[name].equal(weights[name]) for name in weights)
