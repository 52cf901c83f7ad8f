"""The cells of the demo: which compositions are compared, and the learning rates that each may choose from."""

from dataclasses import dataclass

BARE = "bare"
FROZEN, FULL = "Frozen", "Full"

GENERATORS = {"LoRA": "LoRA(r=2)", "AdaLoRA": "AdaLoRA(r=2)", "FLoRA": "FLoRA(r=2)"}
WRAPPERS = {
    BARE: "{}",
    "MAP": "MAP({})",
    "DoRA": "DoRA({})",
    "PreDiag": "PreDiag({})",
    "SORA(PreDiag)": "SORA(PreDiag({}), rank=2)",
}

# Three values a factor of about 3 apart. A head alone bears larger steps than thin factors do, and whole matrices bear
# smaller ones, so their values stand elsewhere; a rough scan of the tuning seed's validation accuracy placed all three.
RATES = (3e-3, 1e-2, 3e-2)
FROZEN_RATES = (3e-2, 1e-1, 3e-1)
FULL_RATES = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Cell:
    """One composition under test; `spec` is its text, None for the frozen base, whose new head alone trains."""

    generator: str
    wrapper: str
    spec: str | None
    rates: tuple[float, ...] = RATES

    @property
    def name(self) -> str:
        """What tables and messages call it."""
        return self.spec or self.generator


def all_cells() -> list[Cell]:
    """The frozen base, full fine-tuning, and every wrapper on every generator: 17."""
    return [
        Cell(FROZEN, BARE, None, FROZEN_RATES),
        Cell(FULL, BARE, "Full()", FULL_RATES),
        *(
            Cell(generator, wrapper, template.format(text))
            for generator, text in GENERATORS.items()
            for wrapper, template in WRAPPERS.items()
        ),
    ]
