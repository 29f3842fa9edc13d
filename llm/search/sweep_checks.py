"""Whether the space of a sweep can be searched, found out before anything starts: each value by its key's own rule, and draws of all keys
together by those that a run is held to. Starts nothing and imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llm.config_changes import MAY_DIFFER, is_below
from llm.config_file import bad_alone
from llm.errors import ConfigError, ModelError
from llm.model.checks import check_model
from llm.model.presets import model_config
from llm.search.space import Domain
from llm.storage import read_bytes

if TYPE_CHECKING:
    from llm.search.sweep_config import Sweep

# Keys that no space may vary, and why.
_OWN = {
    "run": "it is the sweep's own. Use sweep.repeats for several seeds",
    "train.until_step": "the scheduler says where trials pause. Use train.steps or train.tokens for runs of other lengths",
    "eval.rows": "trials are compared by the loss on these rows. Set it for all, in the run or in `set`",
}
_DRAWS = 100  # of all keys together, one of which must make a run


def require_searchable(sweep: Sweep, with_files: bool) -> None:
    """A key that no run has or that is the sweep's own, and a value that its key never takes, are refused before anything starts; so is a
    space of whose values none go together. Those that are legal only together with some of the others are the trials' to tell."""
    domains = sweep.space.domains
    never = {key: told for key, domain in domains.items() if (told := _never(sweep, key, domain))}
    problems = [f"  space.{key}: {told}" for key, told in never.items()]

    def error_of(number: int) -> str:
        drawn = sweep.space.draw(sweep.file.sweep.seed, number)
        return _error(sweep, {key: value for key, value in drawn.items() if key not in never}, with_files)

    if all(error_of(number) for number in range(_DRAWS)):
        alone = {key: _alone(sweep, key, domain, with_files) for key, domain in domains.items() if key not in never}
        if told := _error(sweep, {}, with_files):
            problems.append(f"  no values that were drawn mend the run, which cannot be as it is: {told}")
        else:
            found = [f"  space.{key}: {error}" for key, error in alone.items() if error]
            problems += found or [f"  of {_DRAWS} draws none has values that go together: {error_of(0)}"]
    if problems:
        raise ConfigError("\n".join(["the space cannot be searched:", *problems]))


def _never(sweep: Sweep, key: str, domain: Domain) -> str:
    """Why no trial can have the key, or one of its values, whatever the other keys are; empty where that is not so."""
    for own, why in _OWN.items():
        if is_below(key, [own]) or is_below(own, [key]):
            return why if is_below(key, [own]) else f"it holds {own}: {why}"
    if above := next((each for each in sweep.space.domains if each != key and is_below(key, [each])), None):
        return f"it is a part of space.{above}, whose values replace it. Vary one of the two"
    told = next(filter(None, (bad_alone(sweep.base, key, value) for value in domain.examples())), "")
    return f"{told}{_whole(domain, lambda value: bad_alone(sweep.base, key, value))}" if told else ""


def _alone(sweep: Sweep, key: str, domain: Domain, with_files: bool) -> str:
    """Why the run can have none of the key's values; empty where it can have one."""
    errors = [_error(sweep, {key: value}, with_files) for value in domain.examples()]
    between = errors[2:] if domain.is_continuous else errors  # the ends are never drawn
    return f"{between[0]}{_whole(domain, lambda value: _error(sweep, {key: value}, with_files))}" if all(between) else ""


def _whole(domain: Domain, error: Callable[[Any], str | None]) -> str:
    """The fix where the ends of a domain are legal, and no number between them."""
    between = domain.is_continuous and not any(error(end) for end in domain.options())
    return ". Or draw whole numbers: {quantized: [low, high, step]}" if between else ""


def _error(sweep: Sweep, settings: dict[str, Any], with_files: bool) -> str:
    """Why the run cannot be with these settings, in a line; empty where it can, as far as can be told without its tokenizer."""
    try:
        config = sweep.with_settings("the run", settings)
        if config.model.path and not with_files:
            return ""
        model = model_config(config.model, None, lambda uri: read_bytes(uri, sweep.base.s3))
    except (ConfigError, ModelError) as error:
        return str(error).splitlines()[-1].strip()
    found = check_model(
        model,
        tensor=config.parallel.tensor,
        vocab_size=1,
        seq_len=config.data.seq_len,
        isolate=config.data.isolate_documents,
        attention=config.model.attention,
        mup_base_width=config.model.mup_base_width,
    )
    return found[0][1] if found else ""


def require_population(sweep: Sweep) -> None:
    """Raises ConfigError where its trials could not take over from each other."""
    if foreign := [key for key in sweep.space.domains if not is_below(key, MAY_DIFFER)]:
        raise ConfigError(
            f"scheduler.kind=pbt changes settings while trials train, and space.{foreign[0]} says what the weights or the data are. "
            "Leave it out, or use scheduler.kind=asha."
        )
    if sweep.file.sweep.repeats > 1:
        raise ConfigError("scheduler.kind=pbt needs sweep.repeats=1: trials of other seeds see other data, and cannot take over.")
    if sweep.steps_between(sweep.base) >= sweep.base.train.steps:
        raise ConfigError(f"scheduler.first_frac={sweep.file.scheduler.first_frac:g} leaves one generation. Lower it, for example to 0.2.")
