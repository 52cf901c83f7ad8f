"""The task `hf`: Transformers' models on data sets of `datasets` or of local files; it needs `adapterzoo[hf]`."""

from importlib.util import find_spec

from adapterzoo.errors import MissingPackageError

_MISSING = [name for name in ("transformers", "datasets") if find_spec(name) is None]
if _MISSING:
    raise MissingPackageError(f'the task hf needs {" and ".join(_MISSING)}: pip install "adapterzoo[hf]"')

from adapterzoo.ablation.tasks.hf.task import HF as HF  # noqa: E402  (after the check that says what is missing)
