"""What SGD noise does: power laws in the perceptron, and the (α, T) diagram of a network on digits."""

from __future__ import annotations

from .laboratory import Laboratory
from .noise_network import network_claims
from .noise_perceptron import perceptron_claims
from .result import Claim, Panel
from .study import Study


def investigate(lab: Laboratory) -> tuple[list[Claim], list[Panel]]:
    """All claims, those of the perceptron first; the diagrams of the network first."""
    perceptron, curves = perceptron_claims(lab)
    network, diagrams = network_claims(lab)
    return [*perceptron, *network], [*diagrams, *curves]


STUDY = Study(
    name="sgd-noise-regimes",
    title="SGD noise in distinct regimes: temperature, scale of initialisation and training until all is fitted",
    paper="Sclocchi, Geiger, Wyart, Dissecting the Effects of SGD Noise in Distinct Regimes of Deep Learning, 2023",
    setting="Temperature T = η/B; hinge losses trained until every example is fitted. Perceptron: d = 32, B = 2, "
    "margin κ = 1/128, P = 128 to 4096, 6 to 32 seeds. Digits parity: 64-128-1, ReLU, tangent-kernel parametrisation, "
    "output scale α, B = 8, P = 512 (128 to 1024 over P), 700 test digits, float32, 3 seeds.",
    investigate=investigate,
)
