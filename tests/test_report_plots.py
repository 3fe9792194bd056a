import numpy as np
from test_report_rates import check_names, eleven
from test_report_tables import features, result

from repcodec.report_plots import phone_figure, plots, training_figure, usage_figure
from repcodec.report_tables import families

PHONES = ["a", "<b>", "SIL", "$x^", "e"]


def test_what_the_results_allow_is_drawn():
    results = [result("k-means 64"), result("k-means 128", size=128, pnmi=0.7), result("RepCodec 64")]
    found = plots([*results, features()], PHONES)
    names = ["normalized_error", "pnmi", "usage", "phones_0", "phones_1", "phones_2"]
    assert [plot.name for plot in found] == names
    assert [plot.title for plot in found if plot.phones] == ["k-means 64", "k-means 128", "RepCodec 64"]
    assert [plot.name for plot in found if plot.closed] == ["phones_0"], "the best of each family is open"
    assert found[0].note.startswith("Against bits per second")
    assert "1,024" not in found[3].note and found[3].note.endswith(" codes used")


def test_tokenizers_of_one_rate_stand_beside_their_names():
    found = plots([result("k-means 64", pnmi=None), result("RepCodec 64", normalized_error=0.4)], None)
    assert [plot.name for plot in found] == ["normalized_error", "usage"], "one figure compares nothing"
    assert found[0].note == "At 300 bits per second; lower is better."


def test_training_plot_has_a_line_a_codec_and_a_dashed_one_for_others():
    results = eleven()
    results[4].row.name += ", outputs/compare/a-long-name/codec"
    figure = training_figure(families(results))
    styles = [line.get_linestyle() for line in figure.axes[0].lines]
    assert (styles.count("-"), styles.count("--")) == (6, 4)
    drawn = figure.axes[0].lines[4].get_xydata()
    assert [tuple(point) for point in drawn] == results[4].curve
    check_names(figure, 10)


def test_training_without_a_finite_error_is_not_drawn():
    broken = result("RepCodec 64")
    broken.curve = [(0, float("nan")), (50, float("inf")), (100, 0.5)]
    assert "training" not in [plot.name for plot in plots([broken], None)]


def test_usage_plot_has_the_shares_in_order():
    results = [result("k-means 64"), result("RepCodec 2 x 64", 2)]
    figure = usage_figure(families(results))
    drawn = [line for axes in figure.axes for line in axes.lines]
    assert len(drawn) == 3
    for line, counts in zip(drawn, [*results[0].usage, *results[1].usage], strict=True):
        expected = sorted((count / counts.sum() for count in counts if count), reverse=True)
        ranks = line.get_xdata()
        assert ranks[0] == 1 and ranks[-1] == len(expected)
        np.testing.assert_allclose(line.get_ydata(), [expected[rank - 1] for rank in ranks])


def test_phone_plot_is_the_share_of_each_phone_in_each_code():
    joint = result("k-means 64").joint
    figure = phone_figure(joint, PHONES)
    image = np.asarray(figure.axes[0].images[0].get_array())
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == sorted(PHONES, key=lambda phone: -joint[PHONES.index(phone)].sum())
    used = [code for code in range(64) if joint[:, code].sum()]
    columns = sorted([joint[PHONES.index(name), code] / joint[:, code].sum() for name in names] for code in used)
    np.testing.assert_allclose(sorted(image.T.tolist()), columns)
    assert (np.diff(image.argmax(0)) >= 0).all(), "codes are grouped by their commonest phone"


def test_many_codes_share_columns_and_keep_their_mass():
    joint = np.random.default_rng(0).integers(1, 9, (5, 1000))
    image = np.asarray(phone_figure(joint, PHONES).axes[0].images[0].get_array())
    assert image.shape == (5, 480)
    np.testing.assert_allclose(image.sum(0), 1)
    shares = joint / joint.sum(0)
    np.testing.assert_allclose(sorted(image.mean(1)), sorted(shares.mean(1)))


def test_what_cannot_be_drawn_is_left_out():
    nothing = result("k-means 64", normalized_error=None, pnmi=float("nan"))
    nothing.usage[:] = 0
    nothing.joint[:] = 0
    assert [plot.name for plot in plots([nothing, features(abx_across=0.1)], PHONES)] == ["usage"]
