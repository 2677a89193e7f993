"""What the survey prints about its own papers, to hold the paper list against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

THREAT_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "adversarial": "adversarial",
        "jailbreak": "jailbreak",
        "agent": "agent",
        "backdoor_poisoning": "backdoor, poisoning",
        "ip_protection": "IP protection",
        "prompt_injection": "prompt injection",
        "safety_alignment": "safety alignment",
        "membership_inference": "membership inference",
        "data_extraction": "data extraction",
        "energy_latency": "energy-latency",
        "model_extraction": "model extraction",
    }
)
"""How the threats of the paper list are written."""


@dataclass(frozen=True)
class Printed:
    """The survey's printed statistics as counts of papers.

    cite, where: the source. total: technical papers reviewed. years: by span of years. families: by chapter key. threats: by
    (threat, side) as in `papers()`. Shares are printed in percent with two decimals; each names one whole number of papers.
    """

    cite: str
    where: str
    total: int
    years: Mapping[str, int]
    families: Mapping[str, int]
    threats: Mapping[tuple[str, str], int]


@lru_cache(maxsize=1)
def printed() -> Printed:
    """The statistics that the survey prints, read from the data file beside the paper list."""
    import yaml

    text = files("safescale_lib.survey").joinpath("data/printed_statistics.yml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    total = int(data["technical_papers"])

    def count(percent: float) -> int:
        return round(percent / 100 * total)

    return Printed(
        data["source"]["cite"],
        data["source"]["where"],
        total,
        MappingProxyType(data["years"]),
        MappingProxyType({family: count(share) for family, share in data["families"].items()}),
        MappingProxyType({(row["threat"], row["side"]): count(row["share"]) for row in data["threats"]}),
    )
