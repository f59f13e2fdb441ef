"""The pictures: curves over rounds, outlined predictions, anatomy, methods compared. Each is a matplotlib Figure."""

import numpy as np
import torch

BLUE, ORANGE, GREEN, PURPLE, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY)  # Okabe and Ito's palette: distinct to colour-blind readers


def empty_figure(title, size):
    """A figure without pyplot's global state."""
    from matplotlib.figure import Figure  # imported here: it is slow, and training does not need it

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure


def new_figure(title, rows, columns, size):
    """A figure and its axes as a (rows, columns) array."""
    figure = empty_figure(title, size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_curves(history, title):
    """A run over its rounds: each client's loss, validation Dice by lesion size, the step scale. -> Figure

    history: the rows of rounds.csv, as dictionaries.
    """
    figure, [[losses, dice, scale]] = new_figure(title, 1, 3, (13, 3.8))
    rounds = [row["round"] for row in history]
    for name, colour in zip([key for key in history[0] if key.startswith("loss_")], COLOURS * 9):
        losses.plot(rounds, [row[name] for row in history], ".-", color=colour, label=name.removeprefix("loss_"))
    for name, colour in (("Dice_L", BLUE), ("Dice", "0.4"), ("Dice_S", RED)):
        dice.plot(rounds, [row[name.lower()] for row in history], ".-", color=colour, label=name)
    scale.plot(rounds, [row["eta"] - 1 for row in history], ".-", color=GREEN, label="mean of η - 1")
    scale.plot(rounds, [row["scaled_steps"] for row in history], ".:", color="0.4", label="share of steps with η > 1")
    losses.set(title="training loss by client", xlabel="round", ylabel="mean over the round's steps")
    dice.set(title="validation, all clients", xlabel="round", ylabel="mean Dice", ylim=(0, 1))
    scale.set(title="step scale η, all clients", xlabel="round", ylabel="0 = nothing was scaled", ylim=(0, None))
    for axes in (losses, dice, scale):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def draw_predictions(evaluations, title, count=5):
    """Test images with the outlines of truth and prediction: small lesions above, others below. -> Figure

    evaluations: fedgs.Evaluation of each centre. Of each kind up to `count` images, evenly spaced by size of lesion,
    whatever their scores.
    """
    from matplotlib.lines import Line2D

    kinds = {kind: spaced_by_size(evaluations, small, count) for kind, small in (("small lesion", True), ("no small lesion", False))}
    kinds = {kind: chosen for kind, chosen in kinds.items() if chosen}
    lines, columns = max(len(kinds), 1), max(map(len, kinds.values()), default=1)
    figure, grid = new_figure(title, lines, columns, (2.6 * columns, 2.95 * lines + 0.7))
    for axes in grid.flat:
        axes.set_axis_off()
    for line, (kind, chosen) in zip(grid, kinds.items()):
        for axes, (evaluation, i) in zip(line, chosen):
            images = evaluation.images
            axes.imshow(images.images[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)  # the map is for CT
            outline(axes, images.masks[i, 0].numpy(), "white", "solid")
            outline(axes, evaluation.predicted[i, 0].numpy(), SKY, "dashed")
            facts = f"{kind}, C{images.centre}, 1/a = {images.inverse_area[i]:.0f}, Dice {evaluation.dice[i]:.2f}"
            axes.set_title(f"{images.names[i]}\n{facts}", fontsize=7)
    key = [Line2D([], [], color="white", label="truth"), Line2D([], [], color=SKY, ls="--", label="prediction")]
    figure.legend(handles=key, loc="outside lower center", ncols=2, fontsize=8, facecolor="0.4", labelcolor="white")
    return figure


def spaced_by_size(evaluations, small, count):
    """Up to `count` (evaluation, index) of images with a lesion, evenly spaced over their order by inverse area."""
    found = sorted((e.images.inverse_area[i].item(), k, i) for k, e in enumerate(evaluations) for i in range(len(e.images))
                   if e.images.masks[i].any() and bool(e.images.small[i]) == small)
    positions = torch.linspace(0, len(found) - 1, min(count, len(found))).round().int().tolist()
    return [(evaluations[k], i) for _, k, i in (found[position] for position in positions)]


def outline(axes, mask, colour, style):
    """Draw the outline of a mask, an (H, W) array, on a dark rim that keeps it visible."""
    if mask.any():
        axes.contour(mask, [0.5], colors="black", linewidths=2.6, alpha=0.6)
        axes.contour(mask, [0.5], colors=colour, linewidths=1.4, linestyles=style)


def draw_anatomy(image, anatomy, reconstruction, title):
    """An image, what SD-UTNet makes of it, and the eight channels of anatomy in between. -> Figure

    image, reconstruction (C, H, W), C = 3 or 1, image as the network saw it; anatomy (8, H, W) in [-1, 1].
    """
    figure, grid = new_figure(title, 2, 5, (13, 5.6))
    pair = torch.stack([image, reconstruction]).detach().cpu()
    pair = (pair - pair.min()) / (pair.max() - pair.min())  # one map to [0, 1] for both, so that they compare
    for axes, name, x in zip(grid[:, 0], ("image", "reconstruction"), pair):
        axes.imshow(x.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)  # colour images ignore the last three
        axes.set_title(name, fontsize=9)
    for i, (axes, channel) in enumerate(zip(grid[:, 1:].flat, anatomy.detach().cpu().numpy(), strict=True), start=1):
        scale = axes.imshow(channel, cmap="PuOr", vmin=-1, vmax=1)  # purple and orange differ for colour-blind readers
        axes.set_title(f"anatomy {i}", fontsize=9)
    figure.colorbar(scale, ax=grid[:, 1:], label="value of the anatomy channel", shrink=0.8)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure


def draw_comparison(title, tau, sizes, points, bars):
    """Methods side by side: Dice of every test image against its size, and means by size class, centre and lesion. -> Figure

    sizes: inverse areas of all test images with a lesion; points: {method: (inverse areas (n,), Dice (n,))} of those that its
    runs were tested on; bars: three {measure: {group: {method: [(mean, count) of each run]}}}.
    """
    figure = empty_figure(title, (13, 9.5))
    layout = [["sizes", "first"], ["counts", "first"], ["second", "third"]]
    axes = figure.subplot_mosaic(layout, width_ratios=(3, 2), height_ratios=(4, 1, 4))
    draw_sizes(axes["sizes"], tau, points)
    draw_counts(axes["counts"], axes["sizes"], sizes)
    for place, (measure, groups) in zip(("first", "second", "third"), bars.items(), strict=True):
        draw_bars(axes[place], measure, groups)
    return figure


def draw_sizes(axes, tau, points):
    """Dice against inverse area: images as points, and the running mean of the nearest images with its interval."""
    for (method, (inverse_area, dice)), colour in zip(points.items(), COLOURS * 9):
        axes.scatter(inverse_area, dice, s=9, color=colour, alpha=0.35, linewidths=0)
        if len(dice) > 1:
            half = max(5, len(dice) // 12)
            area, mean, error = running_mean(inverse_area, dice, half, fewest=4)
            label = f"{method}: running mean of up to {min(len(dice), 2 * half + 1)} images, 95 % interval"
            axes.plot(area, mean, color=colour, label=label)
            axes.fill_between(area, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
    axes.axvline(tau, color="0.3", ls=":", label=f"τ = {tau:g}")
    axes.set(title="every test image with a lesion, mean of its runs", ylabel="Dice", xscale="log", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def running_mean(x, y, half, fewest):
    """x in order, at each the mean of y over `half` neighbours on either side, and half the width of its 95 % interval.

    Towards the ends there are as many neighbours on either side as there are on the outer one, but not less than `fewest`.
    """
    order = np.argsort(x, kind="stable")
    reach = np.maximum(fewest, np.minimum(half, np.minimum(np.arange(len(x)), np.arange(len(x))[::-1])))
    windows = [y[order][max(0, i - r) : i + r + 1] for i, r in enumerate(reach)]
    return (x[order], np.array([window.mean() for window in windows]),
            np.array([1.96 * window.std(ddof=1) / np.sqrt(len(window)) for window in windows]))


def draw_counts(axes, above, inverse_area):
    """How many images there are in each range of sizes, below the axes that show them."""
    edges = np.geomspace(0.999 * inverse_area.min(), 1.001 * inverse_area.max(), 13)
    counts, _, patches = axes.hist(inverse_area, edges, color="0.75", edgecolor="white")
    axes.bar_label(patches, [f"{count:.0f}" for count in counts], fontsize=7)
    axes.set(xlabel="inverse area 1/a of an image's lesions: image pixels / lesion pixels", ylabel="images", xscale="log",
             xlim=above.get_xlim(), ylim=(0, 1.25 * counts.max()))


def draw_bars(axes, measure, groups):
    """A bar for each method in each group: the mean of its runs, a point for each, and the number of images below."""
    methods = list(dict.fromkeys(method for group in groups.values() for method in group))
    width = 0.8 / len(methods)
    for k, (method, colour) in enumerate(zip(methods, COLOURS * 9)):
        for i, group in enumerate(groups.values()):
            means = [mean for mean, count in group[method] if count]
            x = i + (k - (len(methods) - 1) / 2) * width
            axes.bar(x, np.mean(means) if means else 0, width, color=colour, alpha=0.6, label=method if i == 0 else None)
            axes.plot([x] * len(means), means, ".", color="0.2", markersize=4)
    counts = [sorted({count for runs in group.values() for _, count in runs}) for group in groups.values()]
    labels = [f"{name}\nn = {span[0]}" + (f" to {span[-1]}" if len(span) > 1 else "") for name, span in zip(groups, counts)]
    axes.set_xticks(range(len(groups)), labels, fontsize=8)
    axes.set(title=f"{measure}: mean of runs, a point each; n: in a run", ylabel=measure, ylim=(0, 1.03))
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)
