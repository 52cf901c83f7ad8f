"""MAP from its default start and from the paper's literal one, trained by plain AdamW: draws map_start.png.

The task: one 64 x 64 linear layer with a random frozen weight, and a target whose weight differs from it by a matrix of
rank 4 and half its norm. Every adapter has rank 4, so that each can represent the target exactly. Full batches, AdamW
as PyTorch sets it (weight decay 0.01), no clipping unless the name says so.

Run it with `python docs/figures/map_start.py`; `curves` gives the numbers alone.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adapterzoo import MAP, AdaptedLinear, LoRA
from adapterzoo.pieces import Piece, Role

SIZE, RANK, SAMPLES, STEPS, SEEDS = 64, 4, 256, 600, 5
RATE = 1e-2
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PICTURE = Path(__file__).parents[1] / "images" / "map_start.png"

LORA, DEFAULT, LITERAL = "LoRA", "MAP", "MAP, literal start"
CLIPPED, UNDECAYED = "MAP, literal start, clipped", "MAP, no decay of α and β"
SPECS: dict[str, Piece] = {
    LORA: LoRA(r=RANK),
    DEFAULT: MAP(LoRA(r=RANK)),
    LITERAL: MAP(LoRA(r=RANK), floor="literal"),
}
# Okabe and Ito's colours, with a dash and a mark of its own for each line: readable in grey and for colour-blind eyes.
STYLE = {
    LORA: ("#000000", ":", "s"),
    DEFAULT: ("#0072B2", "-", "o"),
    UNDECAYED: ("#56B4E9", "-.", "^"),
    LITERAL: ("#D55E00", "--", "X"),
}


def problem(spec: Piece, seed: int) -> tuple[AdaptedLinear, Tensor, Tensor]:
    """The adapted layer, inputs: [samples, in], and targets: [samples, out], of one seed."""
    stream = torch.Generator().manual_seed(seed)
    weight = (2 * torch.rand(SIZE, SIZE, generator=stream) - 1) / SIZE**0.5
    update = torch.randn(SIZE, RANK, generator=stream) @ torch.randn(RANK, SIZE, generator=stream)
    update *= 0.5 * weight.norm() / update.norm()
    x = torch.randn(SAMPLES, SIZE, generator=stream)
    base = nn.utils.skip_init(nn.Linear, SIZE, SIZE, bias=False)
    with torch.no_grad():
        base.weight.copy_(weight)
    return AdaptedLinear(base, spec, seed=seed), x, x @ (weight + update).T


def parameter_groups(layer: AdaptedLinear, decay_magnitudes: bool) -> list[dict[str, object]]:
    """Everything in AdamW's default group, or the parameters whose role is a magnitude in one without decay."""
    kept = {
        id(parameter)
        for part in layer.adapter.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if not decay_magnitudes and part.spec.roles[name] is Role.MAGNITUDE
    }
    trained = list(layer.adapter.parameters())
    groups: list[dict[str, object]] = [{"params": [p for p in trained if id(p) not in kept]}]
    return [*groups, {"params": [p for p in trained if id(p) in kept], "weight_decay": 0.0}] if kept else groups


def curve(
    spec: Piece, seed: int, steps: int, rate: float, clip: float | None = None, decay_magnitudes: bool = True
) -> Tensor:
    """Train on one seed; the loss before every step, as a share of the loss at the start: [steps]."""
    layer, x, y = problem(spec, seed)
    optimiser = torch.optim.AdamW(parameter_groups(layer, decay_magnitudes), lr=rate)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.mse_loss(layer(x), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(layer.adapter.parameters(), clip)
        optimiser.step()
        losses.append(loss.detach())
    return torch.stack(losses) / losses[0]


def curves(steps: int = STEPS, seeds: int = SEEDS, rate: float = RATE) -> dict[str, Tensor]:
    """LoRA, MAP and MAP from the literal start under plain AdamW, by name: [seeds, steps] each."""
    return {
        name: torch.stack([curve(spec, seed, steps, rate) for seed in range(seeds)]) for name, spec in SPECS.items()
    }


def variants(steps: int = STEPS, seeds: int = SEEDS, rate: float = RATE) -> dict[str, Tensor]:
    """The literal start with the gradient clipped to norm 1, and MAP without weight decay of α and β, by name."""
    runs = range(seeds)
    return {
        CLIPPED: torch.stack([curve(SPECS[LITERAL], seed, steps, rate, clip=1.0) for seed in runs]),
        UNDECAYED: torch.stack([curve(SPECS[DEFAULT], seed, steps, rate, decay_magnitudes=False) for seed in runs]),
    }


def first_gradients(seeds: int = SEEDS) -> dict[str, Tensor]:
    """The norm of the first gradient of LoRA's factor B, in units of plain LoRA's: [seeds] each."""
    norms: dict[str, Tensor] = {}
    for name, spec in SPECS.items():
        values = []
        for seed in range(seeds):
            layer, x, y = problem(spec, seed)
            F.mse_loss(layer(x), y).backward()
            found = {path.rpartition(".")[2]: p.grad for path, p in layer.adapter.named_parameters()}
            values.append(found["B"].norm())
        norms[name] = torch.stack(values)
    return {name: norm / norms[LORA] for name, norm in norms.items()}


def draw(by_step: dict[str, Tensor], by_rate: dict[float, dict[str, Tensor]], path: Path = PICTURE) -> None:
    """Two panels: the loss at one learning rate over the steps, and the last loss over the learning rates."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), sharey=True, width_ratios=(1.25, 1))
    last = {name: torch.stack([at[name][:, -1] for at in by_rate.values()]) for name in SPECS}  # [rates, seeds]
    for name, (colour, dash, mark) in STYLE.items():
        values = by_step[name]
        left.fill_between(range(values.shape[1]), *values.aminmax(dim=0), color=colour, alpha=0.18, lw=0)
        left.plot(values.median(dim=0).values, color=colour, ls=dash, lw=2, label=name)
        if name in last:
            right.fill_between(list(by_rate), *last[name].aminmax(dim=1), color=colour, alpha=0.18, lw=0)
            right.plot(list(by_rate), last[name].median(dim=1).values, color=colour, ls=dash, lw=2, marker=mark, ms=6)
    left.set(yscale="log", xlabel="step", ylabel="loss / loss at the start", title=f"learning rate {RATE:g}")
    right.set(xscale="log", xlabel="learning rate", title=f"after {STEPS} steps, by learning rate")
    right.set_xticks(list(by_rate), [f"{rate:g}" for rate in by_rate])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False, handlelength=3)
    figure.suptitle(
        "Plain AdamW, no clipping: MAP trains from its default start and stays stuck from the literal one\n"
        f"{SIZE} × {SIZE} layer, target update of rank {RANK}; median (line) and range (band) of {SEEDS} seeds",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    """Compute everything, print it, draw it."""
    torch.set_num_threads(1)
    by_rate = {rate: curves(rate=rate) for rate in RATES}
    others = variants()
    rows = {f"lr {rate:<7g}{name}": values for rate, at in by_rate.items() for name, values in at.items()}
    rows |= {f"lr {RATE:<7g}{name}": values for name, values in others.items()}
    print(f"loss after {STEPS} steps over the loss at the start, median (range) of {SEEDS} seeds")
    for name, values in rows.items():
        last = values[:, -1]
        print(f"  {name:40}{last.median():9.1e}  ({last.min():.1e} to {last.max():.1e})")
    print("first gradient of B, over LoRA's")
    for name, ratio in first_gradients().items():
        print(f"  {name:40}{ratio.median():9.2g}  ({ratio.min():.2g} to {ratio.max():.2g})")
    draw({**by_rate[RATE], **others}, by_rate)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
