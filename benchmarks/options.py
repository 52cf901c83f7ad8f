"""What one run of the benchmarks is asked for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """How large a run is, and where.

    Attributes:
        quick: fewer rounds and smaller sizes: it shows that everything runs, and is no evidence.
        device: where the tensors live.
        threads: torch's threads.
        seed: seed of weights, inputs, orders and bootstraps.
    """

    quick: bool = False
    device: str = "cpu"
    threads: int = 2
    seed: int = 0

    @property
    def cuda(self) -> bool:
        """The device is a CUDA one."""
        return self.device.startswith("cuda")
