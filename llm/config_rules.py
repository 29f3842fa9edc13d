"""The rules that tie several keys of a run's configuration together."""

from __future__ import annotations

from urllib.parse import urlsplit

from llm.config import RunConfig


def cross_checks(config: RunConfig) -> list[tuple[str, str]]:
    """Every rule that ties several keys together and is broken: (the key to change, what is wrong with the nearest fix)."""
    found: list[tuple[str, str]] = []
    parallel, train, model = config.parallel, config.train, config.model
    if parallel.workers % parallel.tensor:
        near = _nearest_multiples(parallel.workers, parallel.tensor)
        found.append(
            (
                "parallel.workers",
                f"parallel.workers={parallel.workers} cannot be split into tensor groups of {parallel.tensor}. "
                f"Nearest legal values: {near}",
            )
        )
    else:
        found += _batch_problems(config)
        least = parallel.min_workers
        if least is not None and (least > parallel.workers or least % parallel.tensor):
            at_most = min(least, parallel.workers) // parallel.tensor * parallel.tensor or parallel.tensor
            rule = f"must be a multiple of parallel.tensor={parallel.tensor} and at most parallel.workers={parallel.workers}"
            found.append(("parallel.min_workers", f"parallel.min_workers={least} {rule}. Nearest legal value: {at_most}"))
    if (model.preset is None) == (model.path is None):
        found.append(("model.preset", "give exactly one of model.preset and model.path"))
    if model.init == "pretrained" and model.path is None:
        found.append(("model.init", "model.init=pretrained needs model.path, a folder with weights. Or set model.init=random"))
    if model.mup_base_width is not None and train.optimizer != "adamw":
        text = f"model.mup_base_width scales learning rates as AdamW needs it, not {train.optimizer}. Nearest legal value: adamw"
        found.append(("train.optimizer", text))
    if model.mup_base_width is not None and model.init == "pretrained":
        text = "model.mup_base_width says how initial weights are drawn, and model.init=pretrained draws none. Nearest legal value: null"
        found.append(("model.mup_base_width", text))
    found += _budget_problems(config)
    if train.warmup_steps >= train.steps and train.warmup_steps:
        found.append(
            (
                "train.warmup_steps",
                f"train.warmup_steps={train.warmup_steps} must be under train.steps={train.steps}. Nearest legal value: {train.steps - 1}",
            )
        )
    if parallel.offload != "none" and parallel.zero_stage == 0:
        found.append(("parallel.offload", "ZeRO offload needs parallel.zero_stage of 1, 2 or 3. Nearest legal value: 1"))
    if parallel.offload == "all" and parallel.zero_stage in (1, 2):
        found.append(
            (
                "parallel.offload",
                f"parallel.offload=all moves weights too, which needs parallel.zero_stage=3, not {parallel.zero_stage}. "
                "Nearest legal value: optimizer",
            )
        )
    if any(not 0 <= beta < 1 for beta in train.betas):
        found.append(("train.betas", f"train.betas={list(train.betas)}: both must be of at least 0 and under 1. Usual values: [0.9, 0.95]"))
    if train.precision == "fp16" and parallel.zero_stage == 0:
        found.append(
            (
                "parallel.zero_stage",
                "train.precision=fp16 scales the loss, which needs the fp32 master weights of parallel.zero_stage 1, 2 or 3. "
                "Nearest legal value: 1. Or set train.precision=bf16",
            )
        )
    if train.optimizer == "muon" and parallel.zero_stage == 0:
        text = "train.optimizer=muon is DeepSpeed's, which needs parallel.zero_stage of 1, 2 or 3. Nearest legal value: 1"
        found.append(("train.optimizer", text))
    if train.optimizer == "muon" and parallel.tensor > 1:
        text = f"train.optimizer=muon orthogonalizes whole matrices, and parallel.tensor={parallel.tensor} holds parts of them. "
        found.append(("train.optimizer", text + "Nearest legal value: adamw. Or set parallel.tensor=1"))
    found += _source_problems(config)
    if train.steps > 10**9:
        found.append(("train.steps", f"train.steps={train.steps} is more than any run takes. Nearest legal value: 1000000000"))
    try:
        config.export.sample_prompt.encode()
    except UnicodeEncodeError:
        found.append(
            ("export.sample_prompt", "export.sample_prompt holds half of a surrogate pair, which is no text. Nearest legal value: ''")
        )
    try:
        _ = urlsplit(config.s3.endpoint_url or "").port
    except ValueError as error:
        found.append(
            ("s3.endpoint_url", f"s3.endpoint_url={config.s3.endpoint_url!r} is no address: {error}. A legal one: http://127.0.0.1:8333")
        )
    return found


def _source_problems(config: RunConfig) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    names = [source.name for source in config.data.sources]
    for name in sorted({n for n in names if names.count(n) > 1}):
        found.append(("data.sources", f"two sources are named {name!r}; names must differ"))
    if len({source.weight is None for source in config.data.sources}) > 1:
        found.append(("data.sources", "some sources have a weight and some have none: give all of them one, or none"))
    before = 0
    for number, stage in enumerate(config.data.schedule):
        key = f"data.schedule.{number}"
        if config.data.sources[0].weight is None:
            found.append((key, "a schedule changes weights: give every source the weight that it has at first"))
        if stage.from_step <= before:
            found.append((key, f"from_step={stage.from_step} must be above {before}, where the stage before it begins"))
        if unknown := sorted(set(stage.weights) - set(names)):
            found.append((key, f"no source is named {unknown[0]!r}. Nearest legal names: {', '.join(names)}"))
        if not all(weight >= 0 for weight in stage.weights.values()) or not sum(stage.weights.values()) > 0:
            found.append((key, f"weights={stage.weights}: each must be at least 0, and one above 0"))
        before = stage.from_step
    return found


def _budget_problems(config: RunConfig) -> list[tuple[str, str]]:
    """What contradicts itself in how long a run is, and in what its learning rate follows."""
    found: list[tuple[str, str]] = []
    train = config.train
    if train.tokens is not None and train.steps != (steps := train.steps_for(train.tokens, config.data.seq_len)):
        text = (
            f"train.steps={train.steps} and train.tokens={train.tokens} do not agree: so many tokens are {steps} steps of these batches. "
        )
        found.append(("train.tokens", text + "Give one of the two, or set train.steps=null"))
    if train.warmup_steps and train.warmup_frac:
        text = f"train.warmup_steps={train.warmup_steps} and train.warmup_frac={train.warmup_frac:g} say the same thing twice: "
        found.append(("train.warmup_frac", text + "give one of them"))
    if train.lr_batch_rule != "none" and train.lr_batch_rows is None:
        text = f"train.lr_batch_rule={train.lr_batch_rule} needs train.lr_batch_rows, the batch at which train.lr={train.lr:g} holds. "
        found.append(("train.lr_batch_rule", text + f"A legal value: train.batch_rows={train.batch_rows}. Or set train.lr_batch_rule=none"))
    if train.lr_batch_rule == "none" and train.lr_batch_rows is not None:
        text = f"train.lr_batch_rows={train.lr_batch_rows} does nothing with train.lr_batch_rule=none. Set it to sqrt or linear, or leave "
        found.append(("train.lr_batch_rows", text + "train.lr_batch_rows out"))
    return found


def _batch_problems(config: RunConfig) -> list[tuple[str, str]]:
    train, data_size = config.train, config.parallel.data_size
    rows = 1 if train.microbatch_rows == "auto" else train.microbatch_rows
    if rows < 1:
        return [("train.microbatch_rows", f"train.microbatch_rows={rows} must be at least 1, or auto")]
    unit = data_size * rows
    hint = "" if rows == 1 else ". Or set train.microbatch_rows=auto"
    stages = [(f"train.batch_schedule.{number}.rows", stage.rows) for number, stage in enumerate(train.batch_schedule)]
    found = [
        (
            key,
            f"{key}={batch_rows} cannot be split over {data_size} data ranks x {rows} rows per microbatch "
            f"(={unit}). Nearest legal values: {_nearest_multiples(batch_rows, unit)}{hint}",
        )
        for key, batch_rows in [("train.batch_rows", train.batch_rows), *stages]
        if batch_rows % unit
    ]
    before = 0
    for number, stage in enumerate(train.batch_schedule):
        if stage.from_step <= before:
            rule = f"from_step={stage.from_step} must be above {before}, where the stage before it begins"
            found.append((f"train.batch_schedule.{number}", rule))
        before = max(before, stage.from_step)
    return found


def _nearest_multiples(value: int, unit: int) -> str:
    below = value // unit * unit
    return ", ".join(str(n) for n in (below, below + unit, below + 2 * unit) if n > 0)
