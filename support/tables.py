"""Tables: a run's results, one row of numbers for every test image, and rows of cells as text."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from metrics import MEASURES, Evaluation, lesion_dice

SPLITS = {"in_test": "in-test", "out_test": "out-test"}  # name in files -> heading
BATCH_NORM = {
    "averaged": "batch norm's statistics averaged by the server, as published",
    "local": "batch norm's statistics of each centre's own images",
}


def results_tables(results: Mapping[str, Mapping]) -> str:
    """The final tables of a run, one for each kind of batch-norm statistics.

    results: {checkpoint: what results.json says of it}, see runs.summarise_tests
    """
    blocks = []
    for batch_norm, heading in BATCH_NORM.items():
        of_kind = {}
        for name, result in results.items():
            of_kind[name] = {"round": result["round"], **result[batch_norm]}
        blocks.append(f"{heading}\n{results_table(of_kind)}")
    return "\n\n".join(blocks)


def results_table(results: Mapping[str, Mapping]) -> str:
    """A row for each measure, a column a split for each checkpoint.

    results: {checkpoint: {"round": int or None, "in_test": means, "out_test": means}}, means as
    from metrics.means. A cell is a mean and its count. A measure that nothing was counted for has
    no row, a split without images, as without a held-out centre, no column. Checkpoints of the same
    round, which are the same network, share their columns.
    """
    splits = [split for split in SPLITS if was_counted([split], MEASURES, results)]
    measures = [measure for measure in MEASURES if was_counted(SPLITS, [measure], results)]

    # Equal columns of the same round -> the checkpoints that they belong to.
    names_of: dict[tuple, list[str]] = {}
    for name, result in results.items():
        columns = tuple(column_of(result[split], measures) for split in splits)
        names_of.setdefault((result["round"], columns), []).append(name)

    checkpoints = [""]
    headings = [""]
    rows = [[MEASURES[measure]] for measure in measures]
    for (round_, columns), names in names_of.items():
        heading = ", ".join(names)
        if round_ is not None:
            heading += f" (round {round_})"

        for i, (split, column) in enumerate(zip(splits, columns, strict=True)):
            checkpoints.append("" if i else heading)
            headings.append(SPLITS[split])
            for row, text in zip(rows, column, strict=True):
                row.append(text)
    return aligned([checkpoints, headings, *rows])


def column_of(found: Mapping[str, Mapping], measures: Iterable[str]) -> tuple[str, ...]:
    """The cells of one split's means."""
    return tuple(cell(found[measure]) for measure in measures)


def was_counted(
    splits: Iterable[str], measures: Iterable[str], results: Mapping[str, Mapping]
) -> bool:
    """Whether any checkpoint has something to average for any of these measures and splits."""
    for result, split, measure in itertools.product(results.values(), splits, measures):
        if result[split][measure]["n"]:
            return True
    return False


def cell(found: Mapping[str, Any]) -> str:
    """{"mean", "n"} -> "0.812 (n=9)", or a dash where there was nothing to average."""
    if found["n"] == 0:
        return "– (n=0)"
    return f"{found['mean']:.3f} (n={found['n']})"


def score_rows(
    split: str, batch_norm: str, images: Any, evaluation: Evaluation, source: str
) -> list[dict]:
    """The rows of scores.csv for one centre's test, an image each, but for the checkpoint's name.

    split: in_test or out_test; batch_norm: averaged or local; images: data.Images, and evaluation
    theirs; source: where the images come from, so that a stand-in's scores can never be taken for
    those of real data.
    """
    inverse_areas = images.inverse_area.tolist()
    small = images.small.tolist()
    dice = evaluation.dice.tolist()

    rows = []
    for i, (name, lesions) in enumerate(zip(images.names, evaluation.lesions, strict=True)):
        rows.append(
            {
                "split": split,
                "batch_norm": batch_norm,
                "centre": images.centre,
                "name": name,
                "inverse_area": inverse_areas[i],
                "small": int(small[i]),
                "dice": dice[i],
                "lesion_dice": lesion_dice(lesions),
                "lesions": len(lesions.dice),
                "found": int((lesions.dice > 0).sum()),
                "false_components": lesions.false_components,
                "data": source,
            }
        )
    return rows


# ------------------------------------------------------------------------------- cells as text


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns, the first to the left and the others to the right."""
    columns = zip(*rows, strict=True)
    widths = [max(map(len, column)) for column in columns]

    lines = []
    for first, *others in rows:
        texts = [first.ljust(widths[0])]
        for text, width in zip(others, widths[1:], strict=True):
            texts.append(text.rjust(width))
        lines.append("   ".join(texts).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as a table in Markdown, the first row its header."""
    header, *others = [f"| {' | '.join(row)} |" for row in rows]
    rule = "|" + "---|" * len(rows[0])
    return "\n".join([header, rule, *others])
