"""The DeepSpeed engine: ZeRO stage, tensor size, offload and precision become one object with `backward`, `step` and `evaluate`.

Nothing else in Headrace calls DeepSpeed for training. Four of its habits are undone here, once:

- it divides gradients by the number of data ranks; we want the plain sum over the batch, because the loss is already divided by the
  batch's count of predicted tokens (`backward` multiplies it back);
- it wants the number of microbatches a step when it is built, and divides by it; ours may change from step to step, so it is told 1, and
  with each microbatch whether that is the step's last;
- at stage 0 it clips by each rank's own norm, which differs between tensor ranks; we clip by the global norm;
- at tensor size > 1 it skips, without a word, layers that it does not know how to split, and puts split matrices in the place of layers
  with adapters (peft's LoRA), which are gone then; we refuse such a model by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime import compiler
from torch import Tensor, nn

from llm.config import ParallelSection
from llm.config_train import TrainSection
from llm.errors import ConfigError, ModelError
from llm.parallel.mesh import Mesh

# DeepSpeed asks this table only whether it can have shared-memory collectives on the CPU, and fills it by running the C++ compiler for each
# of its operators; then it compiles those collectives: 45 s on a machine's first run, 6 s on later ones. gloo does the same work.
deepspeed.ops.__dict__["__compatible_ops__"] = {}

# Elements that DeepSpeed collects before it reduces them: a buffer that every rank allocates in full, 2 GB in fp32. A model of fewer
# parameters never fills it, so its own size does the same.
REDUCE_BUCKET = 500_000_000

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_precision(asked: str, zero_stage: int) -> Precision:
    """`auto` is the best that the hardware really has: bf16 on GPUs from compute capability 8.0, fp16 from 7.0 (tensor cores; not at
    stage 0, which has no master weights), bf16 on CPUs with AMX tiles, else fp32. CPUs that only emulate bf16 are slower with it than
    without. Raises ConfigError for fp16 without a GPU."""
    if asked == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision=fp16 needs a GPU, and there is none here. Nearest legal values: bf16, fp32, auto")
    if asked != "auto":
        return asked  # pyright: ignore[reportReturnType]
    if torch.cuda.is_available():
        major, _ = torch.cuda.get_device_capability()
        return "bf16" if major >= 8 else "fp16" if major == 7 and zero_stage else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def engine_config(
    parallel: ParallelSection,
    train: TrainSection,
    *,
    precision: Precision,
    microbatch_rows: int,
    num_parameters: int = REDUCE_BUCKET,
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run. Pure."""
    zero: dict[str, Any] = {"stage": parallel.zero_stage, "reduce_bucket_size": min(REDUCE_BUCKET, num_parameters)}
    if parallel.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if parallel.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": microbatch_rows,
        "gradient_accumulation_steps": 1,  # see the module's docstring
        "gradient_clipping": train.grad_clip if parallel.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,
        "wall_clock_breakdown": False,
    }
    if parallel.tensor > 1:
        # Without a gathered head every rank would see a part of the logits only, and the loss below is over all of them.
        config["tensor_parallel"] = {"autotp_size": parallel.tensor, "vocab_parallel_lm_head": False}
    if precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 16, "loss_scale_window": 500}
    elif precision == "bf16" and parallel.zero_stage:
        config["bf16"] = {"enabled": True}
    if train.optimizer == "muon":
        # For the matrices between embedding and head; the rest is Adam's, torch's own, which needs no compiler. At stage 3 Muon needs whole
        # gradients.
        adam = {"betas": train.betas, "eps": train.eps, "torch_adam": True}
        config["optimizer"] = {
            "type": "Muon",
            "params": {"lr": train.lr, "momentum": train.momentum, "weight_decay": train.weight_decay, **adam},
        }
        zero["reduce_scatter"] = parallel.zero_stage < 3
    return config


class Engine:
    """A model on its layout. Every method must be called by all ranks, in the same order."""

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        parallel: ParallelSection,
        train: TrainSection,
        *,
        param_groups: list[dict[str, Any]],
        precision: Precision,
        microbatch_rows: int,
    ) -> None:
        self.mesh = mesh
        self.stage = parallel.zero_stage
        self.precision: Precision = precision
        self.grad_clip = train.grad_clip
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.full_shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if mesh.tensor_size > 1:
            _refuse_adapters(model, mesh.tensor_size)
        if train.optimizer != "muon" or self.device.type == "cpu":
            _import_muon_uncompiled()
        # DeepSpeed's classes declare little of what they have: Any, or every use would need a note for the type checker.
        self.deepspeed: Any
        self.optimizer: Any
        try:
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                model_parameters=param_groups,  # pyright: ignore[reportArgumentType]
                optimizer=_optimizer_factory(train, parallel),  # pyright: ignore[reportArgumentType]
                config=engine_config(
                    parallel,
                    train,
                    precision=precision,
                    microbatch_rows=microbatch_rows,
                    num_parameters=sum(parameter.numel() for parameter in model.parameters()),
                ),
            )
        except (AssertionError, ValueError) as error:
            if mesh.tensor_size == 1:
                raise
            raise ModelError(
                f"{type(model).__name__} cannot be split over parallel.tensor={mesh.tensor_size}: {error} "
                "Set parallel.tensor=1, or use a model of the Llama, Mistral or Qwen families."
            ) from error
        if mesh.tensor_size > 1:
            self._refuse_unsplit(model)
        for group in self.optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])  # Muon's groups are made by DeepSpeed
        # DeepSpeed computes the norm and moves the weights in one call: what lies between them is the inner optimizer's step.
        inner = self.optimizer if self.stage == 0 else self.optimizer.optimizer
        self._update: Callable[[], object] = inner.step
        inner.step = self._update_if_allowed
        self._may_update: Callable[[float], bool] = lambda norm: True
        self._allowed: bool | None = None  # None: not asked yet in this step
        self._norm: Any = None

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    def forward(self, **inputs: Any) -> Tensor:
        """Logits (rows, seq, vocab) of this rank's rows; the same on all tensor ranks."""
        # bf16 at stage 0 keeps fp32 weights and computes under autocast: DeepSpeed has no fp32 master weights there.
        autocast = self.precision == "bf16" and self.stage == 0
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            return self.deepspeed(**inputs).logits

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds this microbatch's gradient. `loss`: its share of the batch's loss, so that the shares of all ranks and microbatches sum
        to the loss; `last`: whether it is the last before `step`, the same on all ranks."""
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * float(self.mesh.data_size))
        if not last:
            self.deepspeed.step()

    def step(self, lr_factor: float, may_update: Callable[[float], bool]) -> float:
        """Clips, updates the weights with every group's own learning rate x `lr_factor`, lets the gradients go.

        `may_update` is asked once, on every rank, with the gradient's global norm before clipping, before any weight or moment moves: where
        it says no, none does. Its answer must be the same on all ranks. Returns the norm, infinite where it is not finite (DeepSpeed leaves
        such updates out by itself; with fp16 it lowers the loss scale, too).

        Muon's momentum moves before it is asked, so there its no comes too late for the momentum, though not for the weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        self._may_update, self._allowed = may_update, None
        self._norm = self._clip() if self.stage == 0 else None
        self.deepspeed.step()
        if self._allowed is None:
            self._norm = float("inf")
            may_update(self._norm)
        return float(self._norm)

    def _update_if_allowed(self) -> None:
        """In the place of the inner optimizer's step, which DeepSpeed calls for each group of parameters."""
        if self._allowed is None:
            if self.stage:
                self._norm = self.optimizer._global_grad_norm
            self._allowed = self._may_update(float(self._norm))
        if self._allowed:
            self._update()

    def _clip(self) -> Tensor:
        """The global gradient norm at stage 0: what is split counts on every tensor rank, what is replicated once."""
        split, whole = torch.zeros(()), torch.zeros(())
        gradients = []
        for name, parameter in self.module.named_parameters():
            if parameter.grad is None:
                continue
            gradients.append(parameter.grad)
            square = parameter.grad.float().pow(2).sum().cpu()
            if tuple(parameter.shape) != self.full_shapes[name]:
                split += square
            else:
                whole += square
        if self.mesh.tensor_size > 1:
            # Every data rank holds the same gradients, so a sum over all ranks counts each part data_size times.
            split = split.to(self.device)
            dist.all_reduce(split)
            split = split.cpu() / self.mesh.data_size
        norm = (split + whole).sqrt()
        if self.grad_clip and self.grad_clip < norm < float("inf"):
            for gradient in gradients:
                gradient.mul_(self.grad_clip / (float(norm) + 1e-6))
        return norm

    def _refuse_unsplit(self, model: nn.Module) -> None:
        """Every matrix but embeddings, norms and a replicated head must really have been split."""
        left = [
            f"{name} ({type(module).__name__} {tuple(weight.shape)})"
            for name, module in _matrix_modules(model)
            if (weight := module.weight) is not None
            and _shape(weight) == self.full_shapes.get(f"{name}.weight")
            and not isinstance(module, nn.Embedding)
            and not name.endswith(("lm_head", "embed_out"))
        ]
        if left:
            kind = type(model).__name__
            raise ModelError(
                f"{kind} cannot be split over parallel.tensor={self.mesh.tensor_size}: DeepSpeed leaves {len(left)} of its layers "
                f"whole, such as {left[0]}. Set parallel.tensor=1, or use a model of the Llama, Mistral or Qwen families."
            )


def _optimizer_factory(train: TrainSection, parallel: ParallelSection) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None:
    """Makes the optimizer from the groups once DeepSpeed has split the model; None for Muon, which DeepSpeed makes itself."""
    if train.optimizer == "muon":
        return None
    if train.optimizer == "sgd":
        return lambda groups: torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum)
    on_gpu = torch.cuda.is_available()
    if parallel.offload != "none" and on_gpu:
        from deepspeed.ops.adam import (
            DeepSpeedCPUAdam,
        )  # compiled on first use; several times faster than torch's on the CPU

        return lambda groups: DeepSpeedCPUAdam(groups, lr=train.lr, betas=train.betas, eps=train.eps, adamw_mode=True)
    return lambda groups: torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=on_gpu)


def _import_muon_uncompiled() -> None:
    """DeepSpeed's ZeRO imports Muon to see whether it has one, which decorates two functions for torch.compile: 2 s of CPU time in
    every worker, and with Muon on a CPU a C++ compiler at the first step."""
    decorate = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorate


def _matrix_modules(model: nn.Module) -> Iterable[tuple[str, Any]]:
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and len(_shape(weight)) == 2:
            yield name, module


def _refuse_adapters(model: nn.Module, tensor_size: int) -> None:
    """A layer that wraps a matrix and shows its weight as its own would be taken for the matrix, and what it adds be lost."""
    wrappers = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and "weight" not in module._parameters
    ]
    if wrappers:
        raise ModelError(
            f"{type(model).__name__} cannot be split over parallel.tensor={tensor_size}: DeepSpeed would drop the adapters of "
            f"{len(wrappers)} of its layers, such as {wrappers[0]}. Set parallel.tensor=1: there they train at every parallel.zero_stage."
        )


def _shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's shape before ZeRO-3 partitioned it (the tensor-parallel part's)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
