"""Is an encoder's weight file here, does it keep its contract, how fast is it?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from pipeline.config import Experiment
from pipeline.devices import resolve_device
from pipeline.examination import examine
from pipeline.pieces import EncoderChoice
from pipeline.support.elsewhere import yielded_elsewhere
from pipeline.support.errors import UserError
from pipeline.support.findings import FAIL, NOTE, OK, Finding, failed
from pipeline.support.network import is_here


def findings(experiment: Experiment, choice: EncoderChoice, is_offline: bool, is_quick: bool) -> Iterator[Finding]:
    """Of its weights, and (unless `is_quick`) of what it does on its device and in its precision (examination.py)."""
    embed = experiment.settings.embed
    try:
        choice.check_interpreter()
    except UserError as error:
        yield failed("environment", error)
        return
    yield (weights := _weights(choice))
    if weights.state == FAIL:
        return
    if is_offline and (service := _service(choice)):
        yield Finding(FAIL, "service", f"its vectors come from {service}",
                      "embed where there is a network, or take another encoder; what is embedded already stays usable")
        return
    if is_quick:
        yield Finding(NOTE, "examination", "left out (--quick)")
        return
    call = choice.module, choice.params, resolve_device(embed.device), embed.precision
    if choice.python is None:
        yield from examine(*call)
    else:
        yield from yielded_elsewhere(choice.python, "pipeline.examination:examine", *call, is_offline)


def _weights(choice: EncoderChoice) -> Finding:
    """Reads all of them, unless their hash is noted already."""
    started = time.perf_counter()
    try:
        identity = choice.identity()
    except UserError as error:
        return failed("weights", error)
    named = [f"{key} {value[:30]}" for key, value in identity.items() if isinstance(value, str) and key != "module"]
    return Finding(OK, "weights", f"{'; '.join(named) or 'none'} ({time.perf_counter() - started:.1f} s)")


def _service(choice: EncoderChoice) -> str:
    """The host that its vectors come from, if it is another machine."""
    host = urlsplit(str(getattr(choice.params, "url", ""))).hostname or ""
    return "" if is_here(host) else host
