"""The run's model on its layout. Apart from `llm/train/loop.py`, which is long enough with what happens from step to step."""

from __future__ import annotations

from llm.errors import ConfigError
from llm.job import Job
from llm.model.build import build_model, enable_activation_checkpointing
from llm.model.mup import scale_initial_weights
from llm.parallel.mesh import Mesh
from llm.parallel.zero import Engine, best_precision
from llm.train.optimizer import param_groups


def build_engine(job: Job, mesh: Mesh) -> Engine:
    """The run's model on its layout, with the same weights on every layout: they follow from run.seed alone."""
    config = job.config
    model = build_model(
        job.model_config,
        seed=config.run.seed,
        attention=config.model.attention,
        pretrained=config.model.path if config.model.init == "pretrained" else None,
    )
    base_width = config.model.mup_base_width
    if base_width is not None:
        scale_initial_weights(model, base_width)
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(model)
    engine = Engine(
        model,
        mesh,
        config.parallel,
        config.train,
        param_groups=param_groups(model, config.train, base_width),
        precision=best_precision(config.train.precision, config.parallel.zero_stage),
        microbatch_rows=config.microbatch_rows,
    )
    if config.train.compile:
        if engine.device.type == "cpu":
            raise ConfigError("train.compile=true needs a GPU, and there is none here. Nearest legal value: false")
        engine.deepspeed.compile()
    return engine
