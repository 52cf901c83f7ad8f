"""Tables for papers: LaTeX with booktabs."""

import re

import pandas as pd

from adapterzoo.ablation.reports.results import Results
from adapterzoo.ablation.reports.tables import Column, cell_columns, effect_columns, effect_title

_LONG = 40


def cells_latex(table: pd.DataFrame, results: Results) -> str:
    """The cells as a LaTeX table.

    Args:
        table: from `cells`.
        results: that it was made from.
    """
    unit = " in per cent" if results.percent else ""
    title = f"{results.column}{unit}: mean and 95 % interval over seeds"
    return _latex(cell_columns(table, results), title, "tab:cells")


def effects_latex(table: pd.DataFrame, results: Results) -> str:
    """The effects as LaTeX tables, one a family.

    Args:
        table: from `effects`.
        results: that it was made from.
    """
    families = [own for _, own in table.groupby("family", sort=False)]
    return "\n".join(
        _latex(effect_columns(own, results), effect_title(own, results), f"tab:effects-{own['family'].iloc[0]}")
        for own in families
    )


def _latex(columns: list[Column], title: str, label: str) -> str:
    """A table in the document's order; long ones break over pages.

    It needs the package booktabs, and longtable for more than 40 rows.
    """
    table = pd.DataFrame({escape(name): list(map(escape, values)) for name, values in columns})
    first = escape(columns[0][0])
    # "\\\\" takes a bracket that follows as its argument, over the line break too.
    table[first] = [f"{{}}{text}" if text.startswith(("[", "*")) else text for text in table[first]]
    numeric = {"n", "p", "p (Holm)", "p (BH)", "parameters", "head", "ms/step", "d_z"}
    return str(
        table.style.hide(axis="index").to_latex(
            hrules=True,
            column_format="".join("r" if name in numeric else "l" for name, _ in columns),
            caption=escape(title),
            label=label,
            environment="longtable" if len(table) > _LONG else "table",
            **({} if len(table) > _LONG else {"position_float": "centering"}),
        )
    )


_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
}  # fmt: skip


def escape(text: str) -> str:
    r"""Text with nothing in it that LaTeX acts on; signs of numbers become those of mathematics.

    Example:
        >>> print(escape("A_1 & 50 %: +1.2 [-0.3, +2.7]"))
        A\_1 \& 50 \%: $+$1.2 [$-$0.3, $+$2.7]
    """
    safe = "".join(_SPECIAL.get(character, character) for character in text)
    return re.sub(r"(?<![\w.)])([+-])(?=\d)", r"$\1$", safe)
