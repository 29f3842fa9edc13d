"""Batch size from measurements: the largest micro-batch that fits, how fast each is, and the critical batch size.

A room of its own inside `llm/train`: it measures with the training's own engine, step and data, which nothing outside may import.
Pure: `memory_model.py`, `speed.py`, `noise_scale.py`, `advice.py`, `plan.py`, `report.py`. Measuring: `probe.py` (what a probe's process
does; knows no Ray), `collect.py` (listens to a group of such processes), `ray_probes.py` (starts them where training would run),
`noise_run.py`. What a run makes of it: `auto.py`.
"""
