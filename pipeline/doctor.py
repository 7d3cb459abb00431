"""doctor: is what an experiment names fit to be run? Each failing line says what mends it."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import Experiment
from pipeline.devices import resolve_device
from pipeline.examination import Finding, examine, failed
from pipeline.pieces import EncoderChoice
from pipeline.support.elsewhere import yielded_elsewhere
from pipeline.support.errors import UserError


def examined(experiment: Experiment, choice: EncoderChoice) -> Iterator[Finding]:
    """What an encoder of the experiment does on its device and in its precision (examination.py)."""
    embed = experiment.settings.embed
    try:
        choice.check_interpreter()
        call = choice.module, choice.params, resolve_device(embed.device), embed.precision
    except UserError as error:
        yield failed("environment", error)
        return
    if choice.python is None:
        yield from examine(*call)
    else:
        yield from yielded_elsewhere(choice.python, "pipeline.examination:examine", *call)


def line_of(finding: Finding) -> str:
    """One line, and below it what to do."""
    advice = "".join(f"\n      {line}" for line in finding.do.splitlines())
    return f"{finding.state:<5} {finding.name:<40} {finding.detail}{advice}"
