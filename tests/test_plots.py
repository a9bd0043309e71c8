"Pictures of attribution and curves: what they show, and that nothing is cut off."
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from sgdrop.metrics import pixel_shares
from sgdrop.plots import (
    forest_plot, plot_attribution_history, plot_focus, show_attribution)


@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close('all')
    yield
    plt.close('all')


def history(n):
    return [dict(epoch=i, attribution_ratio=0.5 / (i + 1), generalization_gap=0.01 * i)
            for i in range(n)]


def focus_curves(ax):
    "The curves of `plot_focus`: of the ratio and of the gap"
    gap_ax, = [a for a in ax.figure.axes if a is not ax]
    (ratio,), (gap,) = ax.lines, gap_ax.lines
    return ratio, gap


def maps(n, *epochs): return {epoch: torch.rand(n, 3, 4, 4) for epoch in epochs}


def table(*names):
    rows = [(0.01 * i, 0.01 * i - 0.02, 0.01 * i + 0.02, 5) for i in range(len(names))]
    return pd.DataFrame(rows, names, ['mean', 'low', 'high', 'n'])


# show_attribution

def rendered(ax):
    "The pixels of an axes as they are drawn, H×W×3 from 0 to 1"
    ax.figure.canvas.draw()
    box = ax.get_window_extent()
    rows = slice(int(ax.figure.bbox.height - box.y1) + 4, -int(box.y0) - 4)
    picture = np.asarray(ax.figure.canvas.buffer_rgba())[rows]
    return picture[:, int(box.x0) + 4:int(box.x1) - 4, :3] / 255


def test_an_image_alone_has_its_colours():
    red = torch.tensor([1., 0, 0]).view(3, 1, 1).expand(3, 8, 8)
    assert (rendered(show_attribution(red)) == [1, 0, 0]).all()
    gray = rendered(show_attribution(torch.full((1, 8, 8), 0.5)))
    assert np.ptp(gray, 2).max() == 0 and gray.mean() == pytest.approx(0.5, abs=0.01)


def test_attribution_darkens_and_colours_the_image_and_leaves_it_visible():
    image, share = torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)
    image[:, :, 4:], share[:, 4:] = 1, 1 / 32
    picture = rendered(show_attribution(image, share, vmax=2))
    middle = len(picture) // 2
    above, below = picture[:middle - 6], picture[middle + 6:]
    assert np.ptp(above, 2).max() < 0.01           # without attribution it is gray
    assert np.ptp(below, 2).min() > 0.1            # with attribution it is coloured
    for part in (above, below):                    # dark and bright remain apart
        left, right = part[:, :middle - 6].mean(), part[:, middle + 6:].mean()
        assert right - left > 0.15
    assert above.mean() - below.mean() > 0.3


def test_the_last_image_carries_the_unit_of_the_colour_bar():
    A = torch.rand(2, 3, 4, 4)
    share = pixel_shares(A, (8, 8))[0]
    ax = plt.subplots()[1]
    assert show_attribution(torch.rand(3, 8, 8), share, vmax=5, ax=ax) is ax
    drawn = ax.images[-1]
    assert np.asarray(drawn.get_array()) == pytest.approx((64 * share[0]).numpy())
    assert drawn.get_clim() == (0, 5) and drawn.cmap(0.)[3] == 0
    bar = ax.figure.colorbar(drawn, ax=ax)
    assert (bar.vmin, bar.vmax) == (0, 5)


def test_a_region_is_outlined_visibly_on_dark_and_on_bright_images():
    region = torch.zeros(1, 8, 8, dtype=torch.bool)
    region[:, 2:6, 2:6] = True
    for brightness in (0., 1.):
        image = torch.full((3, 8, 8), brightness)
        with_line, without = (rendered(show_attribution(image, region=r)).mean(2)
                              for r in (region, None))
        assert np.abs(with_line - without).max() > 0.9


# Curves

def test_each_epoch_has_a_marker_and_epochs_are_whole_numbers():
    for n in (1, 2, 9):
        ax = plot_focus(history(n))
        ax.figure.canvas.draw()
        for curve in focus_curves(ax):
            assert curve.get_marker() not in ('', 'None', None)
            assert curve.get_xdata().tolist() == list(range(1, n + 1))
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)
        labels = {label.get_text() for label in ax.get_xticklabels()}
        assert labels <= set(map(str, range(n + 2)))


def test_focus_curves_are_those_of_the_history_on_the_axes_given():
    given, rows = plt.subplots()[1], history(6)
    assert plot_focus(rows, given) is given and plot_focus(rows) is not given
    ratio, gap = focus_curves(given)
    assert ratio.get_ydata().tolist() == [r['attribution_ratio'] for r in rows]
    assert gap.get_ydata().tolist() == [r['generalization_gap'] for r in rows]
    labels = given.get_xlabel(), given.get_ylabel(), gap.axes.get_ylabel()
    assert labels == ('epoch', 'attribution ratio', 'generalization gap')


def test_a_history_of_maps_shows_the_epochs_it_is_given_on_one_scale():
    images, some = torch.rand(3, 3, 8, 8), maps(3, 0, 5)
    given = plt.subplots(3, 3, squeeze=False)[1]
    axes = plot_attribution_history(images, some, vmax=4., axes=given)
    assert axes is given and len(plt.get_fignums()) == 1
    assert [ax.get_title() for ax in axes[0]] == ['', 'epoch 1', 'epoch 6']
    assert {ax.images[-1].get_clim() for ax in axes[:, 1:].flat} == {(0., 4.)}
    for ax, share in zip(axes[:, 2], pixel_shares(some[5], (8, 8))):
        drawn = np.asarray(ax.images[-1].get_array())
        assert drawn == pytest.approx((64 * share[0]).numpy(), abs=1e-5)


def test_a_forest_has_an_interval_per_method_the_highest_on_top():
    rows = table('cutout', 'sgdrop', 'mixup')
    rows.loc['once'] = (0.05, np.nan, np.nan, 1)             # a single pair
    ax = forest_plot(rows)
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ['cutout', 'sgdrop', 'mixup', 'once']
    *lines, zero = ax.lines
    ends = [line.get_xdata().tolist() for line in lines]
    theirs = (100 * rows[['low', 'mean', 'high']]).to_numpy().tolist()
    assert ends == [pytest.approx(row, nan_ok=True) for row in theirs]
    assert all(line.get_marker() == 'o' for line in lines)  # at the mean
    colours = [line.get_color() for line in lines]
    assert colours == ['C0', 'C1', 'C0', 'C0'] and set(zero.get_xdata()) == {0}
    assert forest_plot(rows, 1, ax=ax) is ax


# Nothing is cut off

def assert_whole(figure):
    "Everything that is drawn lies within the figure"
    figure.canvas.draw()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert 0 <= box.x0 and 0 <= box.y0 and box.x1 <= width and box.y1 <= height


def test_no_label_is_cut_off():
    drawn = [
        plot_focus(history(1)), forest_plot(table('a method with quite a long name')),
        plot_attribution_history(torch.rand(1, 1, 8, 8), maps(1, 0))[0, 0],
        plot_attribution_history(torch.rand(4, 3, 8, 8), maps(4, 0, 9, 99))[0, 0]]
    for ax in drawn:
        ax.set_xlabel('points of accuracy')
        assert_whole(ax.figure)
