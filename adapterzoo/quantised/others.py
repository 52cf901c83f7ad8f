"""Quantised layers that can't be adapted, known by the libraries that they come from, so that the error says so."""

from torch import nn

_LIBRARIES = {
    "gptqmodel": "GPTQ",
    "auto_gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "optimum.quanto": "Quanto",
    "transformers.integrations": "quantised",
    "torch.ao": "quantised",
}


def refusal(module: nn.Module) -> str | None:
    """Say that a module is a linear layer of a library whose kernels could not be checked; None if it is not.

    Args:
        module: any module of a model.

    Returns:
        A sentence about why it can't be adapted, and what to do.

    Example:
        >>> import torch
        >>> from adapterzoo.quantised.others import refusal
        >>> refusal(torch.nn.Linear(4, 3)) is None
        True
    """
    kind = type(module)
    home = f"{kind.__module__}."
    method = next((method for package, method in _LIBRARIES.items() if home.startswith(f"{package}.")), None)
    if method is None or "linear" not in kind.__name__.lower().replace("gemm", "linear").replace("gemv", "linear"):
        return None
    return (
        f"it is a {method} layer of {kind.__module__}, whose products adapterzoo has not been checked with; "
        "load the model in bitsandbytes' 4 or 8 bits, in torchao's int8 or unquantised instead"
    )
