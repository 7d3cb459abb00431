"""doctor: is what an experiment names here, and fit to be run? Each failing line says what mends it.

It looks, decodes and encodes samples, and writes nothing of the experiment. What it can only sample (images, an
encoder's behaviour) may still be broken where it did not look; collect and embed look at everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from pipeline.config import Experiment
from pipeline.doctor import duration, encoders, environment, places, samples
from pipeline.pieces import EncoderChoice
from pipeline.support.findings import Finding, guarded, offline

IMAGES, FEW_IMAGES = 200, 20
_TRACEBACK = "what failed is named above; if it is none of your files, report it"


@dataclass
class Checkup:
    """`command`: how the experiment was named, to be repeated in advice. `is_quick`: no encoder is opened."""

    experiment: Experiment
    command: str
    is_offline: bool = False
    is_quick: bool = False
    decoded: list[Finding] = field(default_factory=list)

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """(section, finding) in turn; what ends a section early is a finding of it."""
        for name, section in self._sections():
            looked = guarded(section, _TRACEBACK)
            for finding in offline(looked) if self.is_offline else looked:
                yield name, finding

    def _sections(self) -> Iterator[tuple[str, Iterator[Finding]]]:
        experiment = self.experiment
        yield "environment", environment.findings(experiment.settings)
        yield "disk and data", places.findings(experiment, self.command)
        yield "images", self._noted(samples.findings(experiment, FEW_IMAGES if self.is_quick else IMAGES))
        for choice in experiment.encoders:
            yield f"encoder {choice.name}", self._encoder(choice)
        if experiment.settings.cluster is not None:
            yield f"cluster {experiment.settings.cluster}", places.cluster(experiment.settings.cluster)

    def _noted(self, findings: Iterator[Finding]) -> Iterator[Finding]:
        for finding in findings:
            self.decoded.append(finding)
            yield finding

    def _encoder(self, choice: EncoderChoice) -> Iterator[Finding]:
        """What it is, what it does, and how long this experiment would take it."""
        seen = []
        for finding in encoders.findings(self.experiment, choice, self.is_offline, self.is_quick):
            seen.append(finding)
            yield finding
        alone = replace(self.experiment, encoders=(choice,))
        yield from duration.findings(alone, [*seen, *self.decoded])


def line_of(finding: Finding) -> str:
    """One line, and below it what to do."""
    advice = "".join(f"\n      {line}" for line in finding.do.splitlines())
    return f"{finding.state:<5} {finding.name:<40} {finding.detail}{advice}"
