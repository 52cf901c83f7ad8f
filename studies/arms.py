"""What is compared: the arms of the study, and how many runs each has."""

from dataclasses import asdict, dataclass
from typing import Literal

from adapterzoo.ablation.minilm import CODE_TOKENS, DOCSTRING_TOKENS, TEMPERATURE

TUNING_SEED = 100
SEEDS = (1, 2, 3, 4, 5)
FEW = SEEDS[:3]
RATES = (1e-3, 3e-3, 1e-2, 3e-2)

LORA, LORA_5, MAP_LORA, ADALORA, ADALOMAP, DORA = (
    "LoRA", "LoRA, r = 5", "MAP(LoRA)", "AdaLoRA", "AdaLoMAP", "DoRA(AdaLoRA)",
)  # fmt: skip
PEFTS, PEFTS_MAP = "AdaLoRA, γ = 0.5", "AdaLoMAP, γ = 0.5"
AWARE, STEPWISE = "MAP(LoRA), scale-aware", "MAP(LoRA), stepwise"

ADAPTIVE = "AdaLoRA(r=8, target_r=4, t_init=10, t_final=20)"
ADAPTIVE_PEFTS = "AdaLoRA(r=8, target_r=4, t_init=10, t_final=20, orth_weight=0.5)"


@dataclass(frozen=True)
class Settings:
    """What every run has in common.

    Args:
        steps, batch: of training; a batch is `batch` functions of one package, and the others are its wrong answers.
        warmup: steps in which the learning rate rises; then it falls to zero along a line.
        candidates: how many functions a docstring chooses from when it is scored.
        train, validation, test: how many pairs of each set are used, the first ones; None for all.
    """

    steps: int = 70
    batch: int = 16
    warmup: int = 7
    candidates: int = 32
    docstring_tokens: int = DOCSTRING_TOKENS
    code_tokens: int = CODE_TOKENS
    temperature: float = TEMPERATURE
    train: int | None = None
    validation: int | None = None
    test: int | None = None


@dataclass(frozen=True)
class Arm:
    """One way to adapt the encoder.

    Args:
        name: what tables call it.
        spec: the composition on all 36 linear layers.
        seeds: of its reported runs.
        rate_of: the arm whose chosen learning rate it takes; None to choose one of its own from `rates`.
        rates: the learning rates that it may choose from.
        scale_aware: what `param_groups` is told.
        turns: steps of a turn of the direction and of the magnitudes, in alternation; None trains jointly.
    """

    name: str
    spec: str
    seeds: tuple[int, ...] = SEEDS
    rate_of: str | None = None
    rates: tuple[float, ...] = RATES
    scale_aware: bool = False
    turns: int | None = None


ARMS = (
    Arm(LORA, "LoRA(r=4)"),
    Arm(LORA_5, "LoRA(r=5)", rate_of=LORA),
    Arm(ADALORA, ADAPTIVE),
    Arm(ADALOMAP, f"MAP({ADAPTIVE})"),
    Arm(MAP_LORA, "MAP(LoRA(r=4))"),
    Arm(DORA, f"DoRA({ADAPTIVE})", FEW),
    Arm(PEFTS, ADAPTIVE_PEFTS, FEW, rate_of=ADALORA),
    Arm(PEFTS_MAP, f"MAP({ADAPTIVE_PEFTS})", FEW, rate_of=ADALOMAP),
    Arm(AWARE, "MAP(LoRA(r=4))", FEW, scale_aware=True),
    Arm(STEPWISE, "MAP(LoRA(r=4))", FEW, turns=5),
)

PAIRS = (
    (ADALORA, LORA),
    (ADALORA, LORA_5),
    (ADALOMAP, LORA),
    (ADALOMAP, ADALORA),
    (ADALOMAP, MAP_LORA),
    (MAP_LORA, LORA),
    (DORA, LORA),
    (DORA, ADALORA),
    (PEFTS, ADALORA),
    (PEFTS_MAP, ADALOMAP),
    (AWARE, MAP_LORA),
    (STEPWISE, MAP_LORA),
)
"""Differences that are reported, left less right, over the seeds that both have."""


@dataclass(frozen=True)
class Job:
    """One run to do."""

    arm: Arm
    lr: float
    seed: int
    role: Literal["tune", "report"]

    @property
    def key(self) -> str:
        """A name for its file."""
        plain = "".join(letter if letter.isalnum() else "_" for letter in self.arm.name.replace("γ", "g"))
        return f"{plain}-{self.role}-{self.lr:g}-{self.seed}"

    def identity(self, settings: Settings, data: str) -> dict[str, object]:
        """All that its outcome depends on, ready for JSON: an outcome of other settings or texts is another one."""
        return {"arm": asdict(self.arm), "lr": self.lr, "seed": self.seed, "role": self.role,
                "settings": asdict(settings), "data": data}  # fmt: skip

    def __str__(self) -> str:
        return f"{self.arm.name}, learning rate {self.lr:g}, seed {self.seed} ({self.role})"


def tuning_jobs(arms: tuple[Arm, ...]) -> list[Job]:
    """Every learning rate of every arm that chooses, on the seed that is not reported."""
    return [Job(arm, lr, TUNING_SEED, "tune") for arm in arms if arm.rate_of is None for lr in arm.rates]


def report_jobs(arms: tuple[Arm, ...], rates: dict[str, float]) -> list[Job]:
    """The reported runs at the chosen rates, seed by seed: if time runs out, all arms lack the same seeds."""
    chosen = {arm.name: rates.get(arm.rate_of or arm.name) for arm in arms}
    jobs = [(seed, arm, chosen[arm.name]) for seed in SEEDS for arm in arms if seed in arm.seeds]
    return [Job(arm, lr, seed, "report") for seed, arm, lr in jobs if lr is not None]
