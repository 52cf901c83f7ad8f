"""pack: several runs of one task side by side in this process, on one frozen base."""

from collections.abc import Callable, Sequence
from typing import Any

from adapterzoo.ablation.packing.bundle import Bundle
from adapterzoo.ablation.packing.choice import Choice, Way, Wish
from adapterzoo.ablation.tasks.task import Outcome, Run, Task

Tell = Callable[[Choice], None]
OF_THE_OPTIMISER = frozenset({"lr", "warmup", "schedule", "weight_decay"})
"""Options in which the tasks of packed runs may differ."""


def pack(
    task: Task | Sequence[Task], runs: Sequence[Run], wish: Wish = "auto", tell: Tell = lambda choice: None
) -> list[Outcome | Exception]:
    """Train several runs side by side, and give what each of them gave, or why it failed.

    The frozen base stands in memory once. In a step the batches of all runs go through it as one, and each adapter,
    head or other part that trains sees its own run's examples alone. Every run has its own optimiser, schedule, step
    rules (AdaLoRA's ranks), seeds, looks and log, by the default loop. A run that fails leaves the others as they are.

    A packed step proves itself when it is first taken, and again when inputs are first filled up to one length: losses
    and gradients are held to those of each run by itself. Where they disagree, or can't be packed at all, the runs are
    trained in turns.

    Args:
        task: of all runs; or one for each run, which may differ in the optimiser's options.
        runs: of any specs and seeds.
        wish: "auto" measures on the first steps whether packing is faster; "packed" and "apart" settle it.
        tell: is given the choice that was made, once, before the runs are scored for the last time.

    Returns:
        One entry a run, in their order. Beside what `train` gives, metrics have `packed`, how many runs shared a step
        at the end (1 where they did not). `ms_per_step` and `seconds` are the run's share, and `memory_bytes`, counted
        apart, is left out on a GPU.
    """
    tasks = [task] * len(runs) if isinstance(task, Task) else list(task)
    problem = packable(tasks, runs)
    if problem is not None:
        tell(Choice(len(runs), Way.APART.value, f"runs can't be packed: {problem}"))
        return [_by_itself(task, run) for task, run in zip(tasks, runs, strict=True)]
    bundle = Bundle(tasks, runs, wish)
    bundle.train()
    tell(bundle.choice)
    return bundle.finish()


def packable(task: Task | Sequence[Task], runs: Sequence[Run]) -> str | None:
    """Say why runs can't be packed, as far as that can be known before they are built; None if nothing is known.

    Example:
        >>> from adapterzoo.ablation.tasks.registry import make_task
        >>> packable(make_task({"name": "digits"}), [])
        'there are 0 runs, and it takes two'
    """
    tasks = [task] if isinstance(task, Task) else list(task)
    if len(runs) < 2:
        return f"there {'is 1 run' if runs else 'are 0 runs'}, and it takes two"
    if len(tasks) not in (1, len(runs)):
        return f"there are {len(tasks)} tasks for {len(runs)} runs"
    first = tasks[0]
    if any(type(task) is not type(first) or _fixed(task) != _fixed(first) for task in tasks):
        return f"their tasks differ in more than {', '.join(sorted(OF_THE_OPTIMISER))}"
    if not first.packable:
        return f"the task {first.name!r} does not say that its model treats the examples of a batch one by one"
    if type(first).run is not Task.run:
        return f"the task {first.name!r} has a loop of its own"
    if any(run.device != runs[0].device or run.shared is not runs[0].shared for run in runs):
        return "they are on different devices or have different data"
    return None


def _fixed(task: Task) -> dict[str, Any]:
    return {name: value for name, value in task.model_dump().items() if name not in OF_THE_OPTIMISER}


def _by_itself(task: Task, run: Run) -> Outcome | Exception:
    try:
        return task.run(run)
    except Exception as error:
        return error
